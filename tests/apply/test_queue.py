"""Workers that meet in a folder: they share, they replace each other, and they stop at what cannot be done."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from shared_work import assert_same, decomposed, finished, start

from eckart.apply.crew import Job, Parcel
from eckart.apply.queue import Queue
from eckart.errors import EckartError, FileError, MismatchError, NotFiniteError

pytestmark = pytest.mark.filterwarnings("ignore::eckart.errors.EckartWarning")

JOBS = [Job("small", 1.0), Job("large", 9.0), Job("middle", 5.0)]
ABOUT = {"model": "m"}

WORKER = """
import sys, time
from eckart.apply import prepare
from eckart.apply.queue import Queue
from shared_work import decomposed
queue, held = Queue(sys.argv[1], {"model": "m"}, ttl=float(sys.argv[2])), int(sys.argv[3])
real = prepare.prepare_site

def slow(model, site, *rest, **more):
    if int(site.name) == held:
        print("held", flush=True)
        time.sleep(60)
    return real(model, site, *rest, **more)

prepare.prepare_site = slow
decomposed(queue)
"""


def double(index: int) -> Parcel:
    return Parcel({"of": JOBS[index].name}, {"x": torch.full((2, 2), 2.0 * index)})


def test_results_come_in_the_order_of_the_jobs_and_stay(tmp_path):
    order = []

    def work(index: int) -> Parcel:
        order.append(index)
        return double(index)

    told = []
    found = Queue(tmp_path, ABOUT).do("stage", JOBS, work, lambda *told_: told.append(told_))
    assert order == [1, 2, 0], "the longest first"
    assert [parcel.note["of"] for parcel in found] == ["small", "large", "middle"]
    assert [float(parcel.tensors["x"][0, 0]) for parcel in found] == [0.0, 2.0, 4.0]
    assert told[0] == ("stage", 0, 3)
    assert told[-1] == ("stage", 3, 3)
    again = Queue(tmp_path, ABOUT).do("stage", JOBS, lambda index: pytest.fail("done already"))
    assert [parcel.note for parcel in again] == [parcel.note for parcel in found]
    assert Queue(tmp_path, ABOUT).do("stage", [Job("other")], lambda index: Parcel(7))[0].note == 7
    assert Queue(tmp_path, ABOUT).do("stage", [], double) == []


def test_decompositions_through_a_folder_are_the_same(tmp_path):
    assert_same(decomposed(Queue(tmp_path, ABOUT)), decomposed())


def test_two_workers_of_which_one_is_killed_while_it_holds_a_job(tmp_path):
    (victim,) = start(WORKER, tmp_path, 1.0, 1)
    try:
        assert victim.line() == "held"
        (claim,) = tmp_path.glob("*/*.claim")
        assert f"process {victim.pid} " in claim.read_text()
    finally:
        victim.kill()
        victim.communicate()
    helper = start(WORKER, tmp_path, 1.0, -1)
    found = decomposed(Queue(tmp_path, ABOUT, ttl=1.0))
    ((code, _, err),) = finished(helper)
    assert code == 0, err[-2000:]
    assert_same(found, decomposed())
    assert len(list(tmp_path.glob("*/*.failed-*"))) == 1, "the death is on record"
    assert not list(tmp_path.glob("*/*.claim"))


def test_another_job_in_the_folder_is_an_error(tmp_path):
    Queue(tmp_path, ABOUT)
    with pytest.raises(MismatchError, match="its model is"):
        Queue(tmp_path, {"model": "another"})


def test_a_job_that_fails_again_and_again_is_given_up_after_all_others_are_done(tmp_path):
    tries = []

    def work(index: int) -> Parcel:
        tries.append(index)
        if index == 1:
            raise MemoryError("too large")
        return double(index)

    with pytest.raises(EckartError, match=r"(?s)1 of 3 jobs failed 3 times.*large: last MemoryError: too large"):
        Queue(tmp_path, ABOUT).do("stage", JOBS, work)
    assert sorted(tries) == [0, 1, 1, 1, 2]
    with pytest.raises(EckartError, match="given up"):
        Queue(tmp_path, ABOUT).do("stage", JOBS, lambda index: pytest.fail("no further try"))
    for file in tmp_path.glob("*/*.failed-*"):
        file.unlink()
    assert len(Queue(tmp_path, ABOUT).do("stage", JOBS, double)) == 3


def test_a_job_that_kills_its_workers_is_given_up(tmp_path):
    stage = [Job("deadly")]
    for _ in range(3):  # what a killed worker leaves: a claim that nobody keeps fresh
        queue = Queue(tmp_path, ABOUT, ttl=30)

        def die(index: int) -> Parcel:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            queue.do("stage", stage, die)
        claim = next(tmp_path.glob("stage-*")) / "000000.claim"
        claim.write_text("process 1 on nowhere")
        os.utime(claim, (1.0, 1.0))
    with pytest.raises(EckartError, match=r"deadly: last its worker ended.*process 1 on nowhere"):
        Queue(tmp_path, ABOUT, ttl=30).do("stage", stage, lambda index: pytest.fail("no further try"))


def test_an_error_on_purpose_is_raised_at_once_and_the_job_given_back(tmp_path):
    def work(index: int) -> Parcel:
        raise NotFiniteError("NaN in the layer")

    with pytest.raises(NotFiniteError, match="NaN"):
        Queue(tmp_path, ABOUT).do("stage", JOBS, work)
    assert not list(tmp_path.glob("*/*.claim"))
    assert not list(tmp_path.glob("*/*.failed-*"))


def test_a_damaged_result_is_named(tmp_path):
    Queue(tmp_path, ABOUT).do("stage", JOBS, double)
    file = next(tmp_path.glob("*/000001.safetensors"))
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(FileError, match=r"000001.safetensors is damaged"):
        Queue(tmp_path, ABOUT).do("stage", JOBS, double)


def test_one_worker_writes_the_result(tmp_path):
    first, second = Queue(tmp_path, ABOUT), Queue(tmp_path, ABOUT)

    def fail() -> None:
        with first.output(tmp_path / "small") as mine:
            assert mine
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fail()
    with second.output(tmp_path / "small") as mine:
        assert mine
    with first.output(tmp_path / "elsewhere") as mine:
        assert not mine
    assert second.wrote
    assert not first.wrote
    assert first.written == {"folder": str((tmp_path / "small").resolve()), "worker": second.claims.me}


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be used"):
        Queue(Path(tmp_path / "file" / "queue"), ABOUT)
