"""The list of mutations is alive: `make mutate` finds all that it names."""

from __future__ import annotations

import mutate
import pytest


def test_every_snippet_and_every_test_is_found():
    mutations = mutate.mutations()
    assert len({mutation.name for mutation in mutations}) == len(mutations) >= 45
    problems = []
    for mutation in mutations:
        try:
            mutate.place(mutation)
            for test in mutation.tests:
                mutate.test_id(mutation, test)
        except LookupError as error:
            problems.append(str(error))
    assert not problems, "\n".join(problems)


def test_what_is_not_found_is_named():
    mutation = mutate.mutations()[0]
    with pytest.raises(LookupError, match=f"'{mutation.name}': expected its snippet once, found it in: nowhere"):
        mutate.place(mutation._replace(old="nobody wrote this"))
    with pytest.raises(LookupError, match=r"expected its snippet once, found it in: .*\.py, "):
        mutate.place(mutation._replace(old="import torch"))
    with pytest.raises(LookupError, match=r"expected one file with the test test_mutate\.py::test_that_is_gone"):
        mutate.test_id(mutation, "test_mutate.py::test_that_is_gone")
