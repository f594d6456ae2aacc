"""What is sent, counted at the collectives, against the plan and the theoretical minimum."""

import distributed_jobs as jobs
import pytest
from ranks import results

WORLD = 4
NAMES = (
    "normuon-paper",
    "muon-spectral",
    "rmnp-nesterov",
    "auon-paper",
    "dct-plain",
    "trion-spectral",
)
LAYOUTS = (
    "rows",
    "fsdp x tp columns",
    "fsdp x tp rows",
    "hsdp",
    "replicated",
    "tp rows alone",
    "tp columns alone",
)
# One status word of three numbers to every other rank, and a flag of one float with the scatter.
STATUS, FLAG = 24, 4


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return results(WORLD, jobs.traffic, tmp_path_factory.mktemp("traffic"), NAMES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_sent_is_what_the_plan_says(found, layout):
    for name in NAMES:
        peers = (2 if "alone" in layout else WORLD) - 1
        for own in found:
            counted, sent, summed, _ = own[name, layout]
            flags = 0 if name in ("rmnp-nesterov", "auon-paper") else FLAG * peers
            # Replicas everywhere get the updates by broadcast, so that one copy is held.
            way = "broadcast" if layout == "replicated" else "all_to_all_single"
            assert counted.get(way, 0) == sent + flags, name
            assert counted.get("all_reduce", 0) == summed, name
            assert counted.get("all_gather", 0) in (0, STATUS), name
            assert set(counted) <= {way, "all_reduce", "all_gather"}, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_normuon_sends_no_more_than_there_and_back(found, layout):
    payload = sum(sum(own["normuon-paper", layout][0].values()) for own in found)
    groups = 2 if "alone" in layout else 1
    assert payload <= 1.05 * groups * found[0]["normuon-paper", layout][3]


def test_replicas_gather_within_one_and_scatter_to_all(found):
    """Of two replicas with two shards each: half a matrix there, one and a half back."""
    numbers = sum(rows * cols for rows, cols in jobs.TRAFFIC)
    sent = sum(own["muon-spectral", "hsdp"][1] for own in found) / 4
    assert abs(sent - 2 * numbers) <= 17  # one matrix has 31 rows of 17


def test_row_wise_methods_send_nothing_for_whole_rows(found):
    for layout in ("rows", "fsdp x tp rows", "hsdp", "tp rows alone"):
        for own in found:
            assert own["rmnp-nesterov", layout][0] == {}
    for own in found:  # split rows: one number of each
        rows = sum(shape[0] for shape in jobs.TRAFFIC)
        assert own["rmnp-nesterov", "tp columns alone"][0]["all_reduce"] == 8 * rows


def test_auon_sends_two_numbers_for_a_split_matrix(found):
    for layout in LAYOUTS:
        for own in found:
            if layout == "replicated":
                assert own["auon-paper", layout][0] == {}
                continue
            assert own["auon-paper", layout][0] == {"all_gather": STATUS, "all_reduce": 4 * 2 * 8}
