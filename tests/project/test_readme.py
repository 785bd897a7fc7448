"""The README is true: its quickstart is the example, and the example and the commands run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from torch_influence.__main__ import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_quickstart_is_the_example_word_for_word() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert block == (ROOT / "examples" / "quickstart.py").read_text()


def test_quickstart_runs() -> None:
    command = [sys.executable, "examples/quickstart.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert re.fullmatch(r"most helpful: \[\d+, \d+, \d+\]\nmost harmful: \[\d+, \d+, \d+\]\n", done.stdout)


def test_meaning_of_a_score_comes_first() -> None:
    first_heading = re.search(r"^## (.*)$", README, flags=re.MULTILINE)
    assert first_heading is not None
    assert first_heading.group(1) == "What a score means"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make (\w+)", README))))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.filterwarnings("error")
def test_demo_finds_the_wrong_labels_and_draws_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "digits.png"
    assert main(["demo", "--out", str(picture)]) == 0
    output = capsys.readouterr().out
    auc = float(re.search(r"by self-influence +([0-9.]+)", output).group(1))  # type: ignore[union-attr]
    assert auc > 0.9  # at random it is 0.5
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture.resolve()) in output
