"""verl's worker and engine (FSDP2, gloo) with this plug-in, against plain gradients of whole groups."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TOLERANCE = 1e-7
"""Of any entry of a gradient; the largest entries are 0.03 and more."""

BASE = {
    "groups": [4, 4, 4],
    "mini_batches": 1,
    "epochs": 1,
    "micro_batch": 1,
    "dynamic": False,
    "scattered": True,
}


@pytest.fixture
def train(folder, environment):
    """All ranks of one call of `train_mini_batch`: what rank 0 found."""
    return partial(_train, folder, environment)


def _train(folder: Path, environment: dict[str, str], ranks: int, **changes) -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cases = [json.dumps(BASE | changes | {"rank": rank, "ranks": ranks, "port": port}) for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "engine_process.py"), str(folder), case],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for case in cases
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-4000:]
    line = next(line for line in outputs[0][0].splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_one_mini_batch_whatever_the_split(train, ranks, dynamic):
    found = train(ranks, dynamic=dynamic)
    assert found["error"] < TOLERANCE < found["largest"] / 1e5
    assert found["log_ratio"] > 5
    assert found["found_losses"] == pytest.approx(found["losses"], rel=1e-5)


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_several_mini_batches_and_epochs_that_tear_ragged_groups(train, ranks, dynamic):
    """Five groups of one to six, padding rows, a rejected completion; two mini-batches, two epochs."""
    found = train(ranks, dynamic=dynamic, groups=[6, 2, 3, 1, 5], mini_batches=2, epochs=2, rejected=[1])
    assert found["error"] < TOLERANCE
    assert found["found_losses"] == pytest.approx(found["losses"], rel=1e-5)
    assert max(found["split_groups"]) > 0


def test_means_over_what_a_mini_batch_holds_would_be_wrong(train):
    """The control: with groups cut at the mini-batch's edge the same comparison fails by far."""
    found = train(1, groups=[6, 2, 3, 1, 5], mini_batches=2, epochs=2, broken=True)
    assert found["error"] > 1e5 * TOLERANCE


def test_a_session_of_several_rows_is_one_completion(train):
    assert train(2, parts=3)["error"] < TOLERANCE


@pytest.mark.parametrize("mode", ["seq-mean-token-sum", "seq-mean-token-mean"])
def test_the_scale_depends_on_neither_micro_batch_nor_loss_agg_mode(train, mode):
    assert train(1, micro_batch=4, loss_agg_mode=mode)["error"] < TOLERANCE


def test_a_session_of_which_a_row_is_rejected_leaves_its_group(train):
    """What is left of it is no completion; rows 0 to 2 are one session's."""
    assert train(2, parts=3, rejected=[1])["error"] < TOLERANCE


def test_rows_that_verl_shuffles_are_found(train):
    """Each rank draws its own mini-batches; the plain steps take the same."""
    found = train(2, shuffle=True, dynamic=True, groups=[6, 2, 3, 1, 5], mini_batches=2, epochs=2)
    assert found["error"] < TOLERANCE
    assert max(found["split_groups"]) > 0


def test_verls_own_kl_and_entropy_terms_are_added_as_they_are(train):
    assert train(2, kl=0.5, entropy=0.1, mini_batches=2)["error"] < TOLERANCE


def test_the_reference_may_be_verls_reference_model(train):
    assert train(2, reference="ref", groups=[6, 2, 3, 1, 5])["error"] < TOLERANCE


def test_nothing_is_scored_twice_where_log_ratios_are_zero_by_construction(train):
    """Old log-probs are the actor's own: the first mini-batch needs no pass, later ones do."""
    found = train(1, on_policy=True)
    assert found["error"] < TOLERANCE
    assert found["passes"] == 0

    found = train(2, on_policy=True, mini_batches=2, epochs=2, scattered=False)
    assert found["error"] < TOLERANCE
    # None for the first of four; each other has one of its own and, of 4 + 4 + 4 rows in slices of 3, one of others.
    assert found["passes"] == 6
