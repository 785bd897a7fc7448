"""verify(): products, solutions, scores and refits against numbers that were made in another way."""

from torch_influence.verification._checks import CHECKS, AsCheck, Evidence
from torch_influence.verification._results import Check, Refits, Verification, check
from torch_influence.verification._verify import verify

__all__ = ["CHECKS", "AsCheck", "Check", "Evidence", "Refits", "Verification", "check", "verify"]
