"""Runs on a Dask cluster: two worker processes of one thread each, on this machine."""

import io
import json
import os
import re
import signal
import sys
import threading
import time

import fake_papers as fakes
import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

import stiefel
from stiefel.atlas import cluster as module
from stiefel.atlas import reproduce
from stiefel.atlas.cluster import ClusterError
from stiefel.atlas.cluster_worker import differences, identity, work
from stiefel.cli import app
from stiefel.papers import Verdict

MEASURED = {"seconds", "peak_rss_mb", "machine", "started"}
"""What two runs of the same code need not agree on."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the fake papers leave their traces; the workers inherit its name."""
    path = tmp_path_factory.mktemp("traces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STIEFEL_TEST_DIR", str(path))
        yield path


@pytest.fixture(scope="module")
def cluster(folder):
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=50
    ) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _clean(folder):
    for path in folder.iterdir():
        path.unlink()


def run(papers, out, **options):
    console = Console(file=io.StringIO(), width=200)
    results = reproduce(papers, out=out, console=console, **options)
    return results, console.file.getvalue()


def records(out):
    return {
        str(path.relative_to(out)): json.loads(path.read_text())
        for path in sorted(out.glob("*/laptop/1.json"))
    }


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def started(folder, seed=1):
    """Process of the slow experiment, once it is running."""
    file = folder / f"started-{seed}"
    wait_for(lambda: file.exists() and file.read_text())
    process = psutil.Process(int(file.read_text()))
    file.unlink()
    return process


def ended(process):
    """Whether it ends within seconds; nobody may be there to bury it."""
    try:
        wait_for(lambda: process.status() == psutil.STATUS_ZOMBIE, seconds=8)
    except psutil.NoSuchProcess:
        return True
    return True


class Beside:
    """Something that happens while the main thread runs papers; its errors are raised."""

    def __init__(self, action):
        self._action, self._error = action, None
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        try:
            self._action()
        except BaseException as error:
            self._error = error

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._thread.join()
        if self._error is not None:
            raise self._error


def test_results_are_those_of_a_local_run(cluster, folder, tmp_path):
    papers = [fakes.quick, fakes.crash, fakes.killed, fakes.local, fakes.sharing_a]
    here, _ = run(papers, tmp_path / "here", seeds=(1,), jobs=2)
    squares = (folder / "squares.txt").read_text().split()
    there, log = run(
        papers,
        tmp_path / "there",
        seeds=(1,),
        cluster=cluster.scheduler_address,
        cluster_store=tmp_path / "store",
    )
    ours, theirs = records(tmp_path / "here"), records(tmp_path / "there")
    assert set(ours) == set(theirs) == {"quick/laptop/1.json", "sharing-a/laptop/1.json"}
    for name, record in ours.items():
        assert set(theirs[name]) == set(record)
        for field in set(record) - MEASURED:
            assert theirs[name][field] == record[field], field
        assert theirs[name]["machine"] == record["machine"]  # for once it is the same machine
    assert theirs["quick/laptop/1.json"]["metrics"] == {"ratio": 0.71, "nothing": "nan"}
    for a, b in zip(here, there, strict=True):
        assert (a.slug, a.verdict) == (b.slug, b.verdict)
        if a.slug != "local":  # refused in other words
            assert a.errors == b.errors
        assert [c.verdict for c in a.claims] == [c.verdict for c in b.claims]
    assert there[1].verdict is Verdict.FAILED
    assert there[1].errors == {1: "RuntimeError: the <matrix> broke"}
    assert "cannot be found on another machine by module and name" in there[3].errors[1]
    text = (tmp_path / "there/crash/laptop/1.error.txt").read_text()
    assert text.startswith("Traceback")
    assert "fake_papers.py" in text
    # The crash and the kill were results, so they were not tried again; progress was told.
    assert log.count("crash seed 1: started") == log.count("killed seed 1: started") == 1
    assert "quick seed 1: done in" in log
    # Shared results went to the store that was named, not beside the results.
    assert squares == ["2", "3"]
    assert len(list((tmp_path / "store").glob("square-*.json"))) == 2
    assert not (tmp_path / "there/_shared").exists()
    assert len(cluster.scheduler.clients) == 1  # ours has gone, the cluster's own is there


def test_a_run_whose_worker_is_killed_is_started_again(cluster, folder, tmp_path):
    def kill():
        child = started(folder)
        child.parent().kill()
        assert ended(child)  # an experiment does not outlive its worker
        assert started(folder).pid != child.pid
        (folder / "hurry").touch()

    with Beside(kill):
        (result,), log = run(
            [fakes.slow], tmp_path, seeds=(1,), cluster=cluster.scheduler_address, retries=1
        )
    assert result.errors == {}
    assert [m.metrics for m in result.measurements] == [{"ratio": 0.5}]
    assert log.count("slow seed 1: started") == 1


def test_lost_workers_are_counted(cluster, folder, tmp_path):
    with Beside(lambda: started(folder).parent().kill()):
        (result,), _ = run(
            [fakes.slow], tmp_path, seeds=(1,), cluster=cluster.scheduler_address, retries=0
        )
    assert result.verdict is Verdict.FAILED
    assert result.errors[1].startswith("The worker that ran slow seed 1 was lost once")
    assert (tmp_path / "slow/laptop/1.error.txt").exists()


def test_schedulers_that_give_up_early_are_asked_again(tmp_path):
    flight = module._Flight(fakes.slow, {"id": "slow-1"})
    pool = module.ClusterPool("", None, [], store=None, retries=2)
    flight.task = module.Task(fakes.slow, 1)
    pool._flights["slow-1"] = flight
    submitted = []
    pool._submit = lambda flight: submitted.append(flight.attempt)
    told = []
    for _ in range(3):
        told += pool._take(flight, "started", "now")
        told += pool._take(flight, "lost", None)
    assert submitted == [1, 2]
    assert [kind for _, kind, _ in told] == ["started"] * 3 + ["crashed"]
    assert "was lost 3 times" in told[-1][2]
    assert len(pool) == 0


def test_ctrl_c_stops_the_runs_and_keeps_what_is_finished(cluster, folder, tmp_path):
    children = []

    def interrupt():
        children.append(started(folder))
        wait_for((tmp_path / "slow/laptop/0.json").exists)
        os.kill(os.getpid(), signal.SIGINT)

    options = {"seeds": (0, 1), "cluster": cluster.scheduler_address}
    with Beside(interrupt), pytest.raises(KeyboardInterrupt):
        run([fakes.slow], tmp_path, **options)
    assert ended(children[0])
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert names == {"slow/laptop/0.json"}
    (folder / "hurry").touch()
    (result,), log = run([fakes.slow], tmp_path, **options)
    assert "1 of 2 results are there already" in log
    assert result.seeds == (0, 1)


def test_workers_of_other_versions_are_refused(cluster, folder, tmp_path):
    from distributed import Client

    def age(version):
        stiefel.__version__ = version

    with Client(cluster, set_as_default=False) as client:
        address = min(client.scheduler_info()["workers"])
        client.run(age, "0.0.1", workers=[address])
        try:
            with pytest.raises(ClusterError) as caught:
                run([fakes.quick], tmp_path, seeds=(1,), cluster=cluster.scheduler_address)
            # A worker that joins later is caught by the run itself.
            order = {"identity": identity([]), "module": "fake_papers"}
            order |= {"name": "quick_experiment", "slug": "quick"}
            kind, why = client.submit(work, order, workers=[address]).result()
        finally:
            client.run(age, stiefel.__version__, workers=[address])
    difference = f"worker {address}: stiefel is 0.0.1 there, {stiefel.__version__} here"
    assert str(caught.value) == f"the cluster cannot repeat this machine's results. {difference}"
    assert (kind, why) == ("differs", difference)
    assert not list(tmp_path.iterdir())
    assert not (folder / "calls.txt").exists()


def test_differences_name_code_and_versions():
    here = identity([module._reference(fakes.quick)])
    assert set(here) == {"stiefel", "python", "torch", "code of quick"}
    assert differences(here, dict(here)) == ""
    assert differences(here, here | {"code of quick": "0" * 64}) == "code of quick differs"
    torch = here["torch"]
    assert differences(here, here | {"torch": "1.0"}) == f"torch is 1.0 there, {torch} here"
    missing = identity([{"module": "no_such_module", "name": "f", "slug": "quick"}])
    assert "No module named 'no_such_module' there" in differences(here, missing)
    assert "ImportError: gone" in differences(here, ImportError("gone"))


def test_a_scheduler_that_goes_away_is_said_in_a_sentence(tmp_path, caplog):
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=0, processes=False, dashboard_address="127.0.0.1:0", silence_logs=50
    ) as cluster:
        address = cluster.scheduler_address

        def close():
            wait_for(lambda: cluster.scheduler.tasks)
            cluster.close()

        with Beside(close), pytest.raises(ClusterError, match="lost the runs on the cluster"):
            run([fakes.quick], tmp_path, seeds=(1,), cluster=address)
    assert f"The cluster at {address} has no worker yet; runs wait for one." in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("tcp://127.0.0.1:9", "no Dask scheduler answers at tcp://127.0.0.1:9 within 1 seconds"),
        ("carrier-pigeon://roof", "'carrier-pigeon://roof' is not the address of a scheduler"),
    ],
)
def test_the_command_ends_with_2_where_no_scheduler_is(monkeypatch, tmp_path, address, message):
    monkeypatch.setattr(module, "CONNECT_SECONDS", 1)
    began = time.monotonic()
    done = CliRunner().invoke(
        app, ["reproduce", "fake_papers:quick", "--out", str(tmp_path), "--cluster", address]
    )
    assert time.monotonic() - began < 15
    assert done.exit_code == 2
    assert message in re.sub(r"\s+", " ", done.stderr)
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


def test_without_dask_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ClusterError, match=re.escape("pip install 'stiefel[cluster]'")):
        run([fakes.quick], tmp_path, seeds=(1,), cluster="tcp://127.0.0.1:9")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retries": -1, "cluster": "tcp://127.0.0.1:9"}, "retries must be at least 0, got -1"),
        ({"cluster_store": "here"}, "no cluster was given"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run([fakes.quick], tmp_path, **options)


def test_the_command_wants_a_cluster_for_its_store(tmp_path):
    done = CliRunner().invoke(app, ["reproduce", "rmnp", "--cluster-store", str(tmp_path)])
    assert done.exit_code == 2
    assert "needs --cluster" in done.stderr
