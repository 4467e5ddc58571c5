import json

import pytest

from squeezed.errors import SqueezedError
from squeezed.vllm.settings import GIB, Settings


def test_settings_survive_the_way_through_json():
    given = Settings(("a", "b"), budget=0.2, preset="paper", context_memory=3, own_tokens=64)
    assert Settings.of(json.loads(json.dumps(given.extra()))) == given


def test_one_directory_needs_no_list():
    assert [str(path) for path in Settings.of({"contexts": "place"}).contexts] == ["place"]


def test_memory_is_a_quarter_of_the_device_unless_said():
    assert Settings().memory_bytes(400) == 100
    assert Settings(context_memory=1.5).memory_bytes(400) == 1.5 * GIB


@pytest.mark.parametrize(
    "extra, said",
    [
        ({"bugdet": 0.1}, "bugdet"),
        ({"budget": 0}, "budget"),
        ({"budget": True}, "budget"),
        ({"budget": "0.1"}, "budget"),
        ({"contexts": 7}, "contexts"),
        ({"contexts": [7]}, "contexts"),
        ({"context_memory": 0}, "context_memory"),
        ({"context_memory": "8"}, "context_memory"),
        ({"own_tokens": -1}, "own_tokens"),
        ({"scan_seconds": 0}, "scan_seconds"),
        ({"preset": 1}, "preset"),
    ],
)
def test_settings_refuse_by_name(extra, said):
    with pytest.raises(SqueezedError, match=said):
        Settings.of(extra)
