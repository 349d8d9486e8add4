"""Random wrong input: a short run of `tests/fuzz.py`."""

import fuzz
import pytest


@pytest.mark.weekly
def test_no_wrong_input_of_sixty_is_handled_badly():
    counts, bad = fuzz.fuzz(60, first_seed=0)
    assert not bad
    kinds = {kind for kind, _ in counts}
    assert {"settings", "environments", "classes", "files"} == kinds
    assert sum(number for (_, verdict), number in counts.items() if verdict == "one line") > 30


def test_what_is_handled_badly_is_seen(tmp_path):
    """Each kind of fault gets its own verdict."""

    def verdict(script):
        return fuzz.attempt(fuzz.Case("", [], script=script), tmp_path)

    def leave(code):
        raise SystemExit(code)

    def make_a_folder():
        (tmp_path / "left").mkdir()
        leave("error: x")

    def print_a_traceback():
        print("Traceback (most recent call last):")
        leave("error: x")

    assert verdict(lambda: leave("error: x")) == "one line"
    assert verdict(fuzz.accept) == "accepted"
    assert verdict(lambda: leave("error: x\ny")).startswith("no line")
    assert verdict(lambda: leave("error: " + "x" * 1000)).startswith("too long")
    assert verdict(lambda: leave("error: x; the traceback is in y")).startswith("did not foresee")
    assert verdict(lambda: leave(2)) == "exits with 2"
    assert verdict(lambda: 1 / 0).startswith("raises ZeroDivisionError")
    assert verdict(print_a_traceback).startswith("prints a traceback")
    assert verdict(make_a_folder).startswith("changes {")
