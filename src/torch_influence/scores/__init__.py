"""Scores in tiles, and the ends of each query's ranking."""

from torch_influence.scores._ranking import Ranking, TopInfluences, check_top_k, top
from torch_influence.scores._tiles import Tile, from_stests, from_training_rows, whole

__all__ = ["Ranking", "Tile", "TopInfluences", "check_top_k", "from_stests", "from_training_rows", "top", "whole"]
