"""`bench/serve.py` and `bench/soak.py`: their arithmetic, and a moment of either with the embedded model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parent.parent.parent / "bench"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """They import each other, as scripts of one folder do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield


@pytest.fixture(scope="module")
def serve(scripts: None) -> ModuleType:
    return importlib.import_module("serve")


@pytest.fixture(scope="module")
def soak(scripts: None) -> ModuleType:
    return importlib.import_module("soak")


def test_rates_are_of_all_clients_together(serve: ModuleType) -> None:
    samples = [serve.Sample(asked=0, first=1, ended=4, tokens=10), serve.Sample(asked=1, first=3, ended=5, tokens=15)]
    assert serve.Turn(2, samples).rate == 5
    assert [sample.wait for sample in samples] == [1, 2]


@pytest.mark.parametrize(
    ("number", "share", "found"), [(1, 0.99, 1), (100, 0.99, 99), (101, 0.99, 100), (200, 0.5, 100)]
)
def test_percentiles(serve: ModuleType, number: int, share: float, found: int) -> None:
    assert serve.percentile(list(range(number, 0, -1)), share) == found


def test_memory_that_grows_shows(soak: ModuleType) -> None:
    flat = [soak.Reading(60 * i, 100 if i >= 20 else 5 * i, 30, 10, 8, 20) for i in range(100)]
    grows = [soak.Reading(60 * i, 100 + 2 * i, 30, 10, 8, 20) for i in range(100)]
    assert soak.growth(flat)["megabytes_a_minute"] == 0
    assert soak.growth(flat)["megabytes_early"] == soak.growth(flat)["megabytes_late"] == 100
    assert soak.growth(grows)["megabytes_a_minute"] == pytest.approx(2)
    assert soak.leaks(flat) == []
    assert len(soak.leaks(grows)) == 1 and soak.leaks(grows[:5]) == []


def test_clients_at_one_server(serve: ModuleType) -> None:
    with serve.Iolite("nano", "--chats", "none") as server, server.client() as client:
        questions = serve.prompts(client, 12, 4, seed=1)
        assert all(len(ids) >= 12 for _, ids in questions)
        ends = serve.to_ids(client, serve.ENDS, False)
        turn = serve.take_turn(2, 2, lambda i: serve.ask_iolite(client, questions[i][0], 6, ends))
        assert [sample.tokens for sample in turn.samples] == [6] * 4
        assert all(sample.asked < sample.first <= sample.ended for sample in turn.samples)


def test_a_short_soak(soak: ModuleType, serve: ModuleType, tmp_path) -> None:
    """Every request is accounted for, an account that is off by one is not, and a kill loses nothing."""
    account, options = soak.Account(), ("--chats", str(tmp_path / "chats.sqlite"))
    with serve.Iolite("nano", *options) as server:
        client = soak.Client(server, account, 3)
        with client.http:
            for _ in range(30):
                client.act()
            client.account.sent["chat"] += 1
            client.chat()
        found = soak.settle(server, account)
        assert soak.audit(account, found) == []
        account.answers += 1 + account.unsure
        assert any("answers are counted" in line for line in soak.audit(account, found))
        account.statuses[400] += 1
        assert any("status 400" in line for line in soak.audit(account, found))
        soak.kill(server, account, 2, 0.7)
    with serve.Iolite("nano", *options) as server:
        checked, lost = soak.check_chats(server, account)
        assert checked >= 4
        assert lost == []
        kept = next(iter(account.chats.values()))
        kept[next(iter(kept))] = ("user", "what was never said")
        assert len(soak.check_chats(server, account)[1]) == 1
