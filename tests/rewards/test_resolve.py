from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gvpo.errors import UserError
from gvpo.rewards import READY, RewardFunction, resolve_rewards
from gvpo.rewards.limits import Limits
from gvpo.rewards.workers.pool import PooledFunction


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory that is not yet on the path; modules imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def refusal(spec: Any) -> str:
    """The one line that refuses."""
    with pytest.raises(UserError) as caught:
        resolve_rewards(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


def one(**kwargs: Any) -> list[float]:
    return [1.0]


def test_callables_names_and_module_functions_in_order(folder: Path):
    (folder / "my_rewards.py").write_text("def two(**kwargs):\n    return [2.0]\n")
    found = resolve_rewards([one, "my_rewards:two", "exact_match"])
    assert [entry.name for entry in found] == ["one", "two", "exact_match"]
    assert found[0] == RewardFunction("one", one)
    assert found[1].function() == [2.0]
    assert found[2].function is READY["exact_match"]


def test_one_entry_needs_no_list_and_a_list_may_be_empty():
    assert resolve_rewards(one) == [RewardFunction("one", one)]
    assert resolve_rewards("last_number") == [RewardFunction("last_number", READY["last_number"])]
    assert resolve_rewards(()) == []


def test_the_working_directory_is_searched_first_and_stays_for_imports_at_call_time(folder: Path):
    (folder / "colorsys.py").write_text(
        "def late(**kwargs):\n    import neighbour_of_mine\n    return neighbour_of_mine.VALUE\n"
    )
    (folder / "neighbour_of_mine.py").write_text("VALUE = [3.0]\n")
    sys.modules.pop("colorsys", None)  # the standard library has one, too
    assert resolve_rewards("colorsys:late")[0].function() == [3.0]
    assert sys.path.count(str(folder)) == 1
    resolve_rewards("colorsys:late")
    assert sys.path.count(str(folder)) == 1


def test_modules_in_packages(folder: Path):
    (folder / "my_package").mkdir()
    (folder / "my_package" / "inner.py").write_text("def three(**kwargs):\n    return [3.0]\n")
    assert resolve_rewards("my_package.inner:three")[0].function() == [3.0]


def test_names_are_made_unique():
    def two(**kwargs: Any) -> list[float]:
        return [2.0]

    def one_2(**kwargs: Any) -> list[float]:
        return [2.0]

    assert [entry.name for entry in resolve_rewards([one, two, one, one])] == ["one", "two", "one_2", "one_3"]
    assert [entry.name for entry in resolve_rewards([one, one, one_2])] == ["one", "one_3", "one_2"]


def test_names_of_partials_and_objects():
    class Judge:
        def __call__(self, **kwargs: Any) -> list[float]:
            return [1.0]

    assert [entry.name for entry in resolve_rewards([functools.partial(one, x=1), Judge()])] == ["one", "Judge"]


def test_an_unknown_ready_made_name_gives_the_nearest_and_the_other_form():
    message = refusal("exact_mach")
    assert "'exact_mach'" in message and "did you mean 'exact_match'?" in message and "'module:function'" in message
    assert "there is 'boxed_format', 'code_accuracy', 'exact_match', 'gsm8k_answer'" in refusal("zzz")


def test_a_module_that_is_not_found(folder: Path):
    message = refusal("no_such_module:score")
    assert "no module 'no_such_module'" in message and str(folder) in message
    assert "no module 'no_such_package'" in refusal("no_such_package.inner:score")
    (folder / "a_file.py").write_text("")
    assert "write 'a_file' without '.py'" in refusal("a_file.py:score")


def test_a_module_that_raises_on_import(folder: Path):
    (folder / "raising.py").write_text("x = 1\n\nraise RuntimeError('no key\\nset KEY')\n")
    message = refusal("raising:score")
    assert f"importing 'raising' raised RuntimeError: no key set KEY ({folder / 'raising.py'}:3)" in message
    (folder / "needing.py").write_text("import os\nimport no_such_dependency\n")
    message = refusal("needing:score")
    assert "ModuleNotFoundError: No module named 'no_such_dependency'" in message
    assert f"({folder / 'needing.py'}:2)" in message
    (folder / "broken.py").write_text("def score(:\n")
    assert "SyntaxError" in (message := refusal("broken:score")) and f"({folder / 'broken.py'}:1)" in message
    (folder / "leaving.py").write_text("import sys\nsys.exit('usage: leaving FILE')\n")
    assert "SystemExit: usage: leaving FILE" in refusal("leaving:score")


def test_the_original_exception_is_chained(folder: Path):
    (folder / "raising_too.py").write_text("1 / 0\n")
    with pytest.raises(UserError) as caught:
        resolve_rewards("raising_too:score")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_missing_function_gives_the_nearest_and_the_file(folder: Path):
    (folder / "spelling.py").write_text("def correctness(**kwargs):\n    return []\n\ndef _corectnes(): ...\n")
    message = refusal("spelling:corectnes")
    assert "has no 'corectnes'; did you mean 'correctness'?" in message and str(folder / "spelling.py") in message
    assert "there is 'correctness'" in refusal("spelling:zzz")
    (folder / "vacant.py").write_text("")
    assert "there is none" in refusal("vacant:zzz")


def test_what_cannot_be_called(folder: Path):
    (folder / "values.py").write_text("score = [1.0]\n")
    assert "'values:score' is a list, which cannot be called" in refusal("values:score")
    assert "entry 1 (counted from 0) is 3, which cannot be called" in refusal([one, 3])
    assert "reward_funcs is 3" in refusal(3)


@pytest.mark.parametrize("spec", ["a:b:c", "a::b", "a:b:"])
def test_more_than_one_colon(spec: str):
    assert f"{spec!r} has more than one colon" in refusal(spec)


@pytest.mark.parametrize("spec", [":score", "rewards:", ".rewards:score", "folder/rewards:score", "rewards: score"])
def test_other_forms(spec: str):
    assert f"{spec!r} is not of the form 'module:function'" in refusal(spec)


def test_a_current_directory_on_the_path_is_not_put_there_again(folder: Path):
    sys.path.insert(0, "")
    resolve_rewards("os:getcwd")
    assert os.getcwd() not in sys.path


def test_a_function_that_has_a_pool_by_name_has_it_as_itself_too():
    from gvpo.rewards import math_accuracy

    limits = Limits(workers=1)
    named, itself, bare = (
        resolve_rewards(*one)[0] for one in (("math_accuracy", limits), (math_accuracy, limits), (math_accuracy,))
    )
    assert isinstance(named.function, PooledFunction) and isinstance(itself.function, PooledFunction)

    @functools.wraps(math_accuracy)
    def half(**arguments: Any) -> list[float]:
        return [(value or 0.0) / 2 for value in math_accuracy(**arguments)]

    assert resolve_rewards(half, limits)[0].function is half
    assert bare.function is math_accuracy and named.name == itself.name == bare.name == "math_accuracy"


@pytest.mark.parametrize("limits", [None, Limits(workers=1)])
def test_a_package_that_is_missing_is_told_before_anything_is_scored(
    folder: Path, monkeypatch: pytest.MonkeyPatch, limits: Limits | None
):
    (folder / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'math_verify' else find(name, *more)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    imports = "from gvpo.rewards import resolve_rewards; from gvpo.rewards.limits import Limits"
    code = f"{imports}; resolve_rewards('math_accuracy', {limits})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stderr.splitlines()[-1] == (
        "gvpo.errors.UserError: reward_funcs: 'gvpo.rewards.math:math_accuracy': math_accuracy needs math-verify: "
        "pip install 'gvpo[math]'"
    )
