"""Pages and tutorial: Python runs, commands and links are valid."""

import ast
import importlib
import inspect
import json
import re
import shlex
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import gpu, throughput
from docs.keys_page import PAGE, keys_page
from experiments.study import read_study
from trxl.config import LAUNCH_KEYS, names_and_texts, read_overrides
from trxl.environments import SingleEnvironment
from trxl.environments.validation import check_environment, check_values
from trxl.errors import ConfigError
from trxl.search.settings import SEARCH_KEYS, read_settings, read_space

from evaluate_PPO_trXL import OPTIONS
from trainer_Muesli_trXL import MUESLI
from trainer_PPO_trXL import KEYS

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
PAGES = [
    README,
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "tutorial.ipynb",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
LINKING = [
    *PAGES,
    REPOSITORY / "CHANGELOG.md",
    *(REPOSITORY / "benchmarks").glob("*.md"),
    REPOSITORY / "experiments/log.md",
    *REPOSITORY.glob("results_*/README.md"),
]
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
TRAINING_KEYS = {**MUESLI.keys, **KEYS, **LAUNCH_KEYS}


def name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def markdown(page: Path) -> str:
    """Returns the text of a page; of a notebook, its Markdown cells."""
    if page.suffix == ".md":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(x["source"]) for x in cells if x["cell_type"] == "markdown")


def blocks(page: Path, kind: str) -> list[str]:
    """Returns the code of a page's fences of a kind, such as "python" or "python no-run"."""
    return [code for info, code in FENCE.findall(markdown(page)) if info == kind]


def prose(page: Path) -> str:
    return FENCE.sub("", markdown(page))


def each_block(kind: str):
    return [
        pytest.param(code, id=f"{name(page)}-{number}")
        for page in PAGES
        for number, code in enumerate(blocks(page, kind))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", [x for x in PAGES if blocks(x, "python")], ids=name)
def test_its_python_runs(page, tmp_path, monkeypatch):
    """Python of the pages runs after the README's first command, whose run is committed."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "gymnax").symlink_to(REPOSITORY / "results_gymnax")
    monkeypatch.chdir(tmp_path)
    defined: dict = {"__name__": "page"}
    exec(compile("\n".join(blocks(page, "python")), "page", "exec"), defined)
    for own in defined.values():
        if isinstance(own, type) and SingleEnvironment in own.__bases__:
            check_environment(own.__name__, own())
            check_values(own.__name__, own())


@pytest.mark.parametrize("code", each_block("python no-run"))
def test_python_that_needs_a_run_of_the_readers_calls_what_is_there(code):
    functions = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            functions |= {alias.name: getattr(module, alias.name) for alias in node.names}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            keywords = dict.fromkeys(keyword.arg for keyword in node.keywords)
            inspect.signature(functions[node.func.id]).bind(*node.args, **keywords)


def commands() -> list[tuple[str, list[str]]]:
    """Returns every shell command of the pages, in fences and between backticks, as words."""
    found = []
    for page in [*PAGES, REPOSITORY / "benchmarks" / "README.md"]:
        lines = "".join(blocks(page, "bash")).splitlines()
        lines += re.findall(r"`((?:python|pip|sbatch|\.ci/)[^`]*)`", prose(page))
        for line in lines:
            line = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line)  # environment variables
            words = shlex.split(re.sub(r"<[^>]*>", "WORD", line), comments=True)
            starts = [0, *(i + 1 for i, word in enumerate(words) if word == "&&"), len(words) + 1]
            found += [(name(page), words[a : b - 1]) for a, b in pairwise(starts)]
    return [(page, words) for page, words in found if words]


def check_settings(script: str, arguments: list[str]) -> None:
    """Raises unless a script of this repository accepts these arguments."""
    if script == "evaluate_PPO_trXL.py":
        folder, *settings = arguments
        committed = REPOSITORY / folder.replace("runs/", "results_")
        saved = any(committed.glob("*_params.npy"))
        assert folder == "FOLDER" or saved or "corridor" in folder
        read_overrides(settings, OPTIONS)
    elif script == "search_trXL.py":
        given = dict(names_and_texts(arguments))
        read_settings(given)
        read_space(given, TRAINING_KEYS)
    elif script in ("experiments/study.py", "experiments/sweep.py"):
        for run in read_study((REPOSITORY / arguments[0]).read_text()):
            read_overrides([*run.overrides], TRAINING_KEYS)
    elif script == "experiments/compare.py":
        assert (REPOSITORY / arguments[0]).exists()
    elif script == "benchmarks/gpu.py":
        mode, *arguments = arguments
        assert mode in gpu.MODES
        throughput.read_config(arguments, "train_PPO_trXL_pmap.py")
    elif script == "benchmarks/throughput.py" and arguments[:1] == ["turns"]:
        for config in arguments[1:]:
            throughput.read_config(shlex.split(config))
    elif script in ("benchmarks/throughput.py", "benchmarks/growth.py", "benchmarks/scaling.py"):
        throughput.read_config([x for x in arguments if x != "memory"])
    elif script == "tests/fuzz.py":
        assert all(argument.isdigit() for argument in arguments)
    elif script.startswith(("train_", "benchmarks/")):
        options = ("--nodes", "--help")
        entry = [x for x in arguments if x.endswith(".py") and "=" not in x]
        assert all((REPOSITORY / x).exists() for x in entry)
        settings = [x for x in arguments if x not in entry and not x.startswith(options)]
        read_overrides(settings, TRAINING_KEYS)


@pytest.mark.parametrize(
    ("page", "words"), [pytest.param(*c, id=f"{c[0]}: {' '.join(c[1])}") for c in commands()]
)
def test_its_commands_would_be_understood(page, words):
    del page
    program, *arguments = words
    if program in ("python", "sbatch"):
        scripts = [x for x in arguments if x.endswith((".py", ".sh")) and "=" not in x]
        if scripts:
            assert (REPOSITORY / scripts[0]).is_file()
            arguments.remove(scripts[0])
            check_settings(scripts[0], arguments)
        else:
            flag, module, *_ = arguments
            assert flag in ("-m", "-c")
            of_the_site = module == "zensical"  # in requirements-docs.txt
            assert flag == "-c" or of_the_site or find_spec(module) is not None, module
    elif program == "pip":
        files = [x for flag, x in pairwise(arguments) if flag == "-r"]
        assert all((REPOSITORY / file).is_file() for file in files)
    elif "/" in program:
        assert (REPOSITORY / program).is_file()
    else:
        assert program in ("ruff", "mypy", "pre-commit", "git", "cd")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_settings_between_its_backticks_are_read(page):
    for setting in re.findall(r"`([A-Za-z_]+=[^`]+)`", prose(page)):
        key = setting.partition("=")[0]
        of_no_config = key.startswith(("JAX_", "XLA_")) or setting == "KEY=VALUE"
        if of_no_config or (key.islower() and key not in TRAINING_KEYS):  # a function's argument
            continue
        known = next(keys for keys in (TRAINING_KEYS, SEARCH_KEYS, OPTIONS) if key in keys)
        try:
            read_overrides([setting], known)
        except ConfigError as error:
            pytest.fail(f"{setting}: {error}")


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=name)
def test_what_it_links_to_is_there(page):
    text = prose(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if target.startswith(("http", "../../actions/", "../../deployments/")):  # GitHub's pages
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_readme_is_short_and_leads_to_every_page():
    text = README.read_text()
    assert len(text.split()) <= 900
    for page in PAGES[1:]:
        assert f"]({name(page)})" in text, name(page)
    results = text.partition("\n## Results\n")[2].partition("\n## ")[0]
    rows = [line for line in results.splitlines() if line.startswith("|")]
    assert 1 <= len(rows) - 2 <= 8
    assert "episode_0.gif" in text.partition("\n## ")[0]


def test_the_page_of_keys_is_the_one_that_the_table_gives():
    assert PAGE.read_text() == keys_page(PAGE.read_text()), "run python docs/keys_page.py"


def test_the_page_on_programs_names_the_keys_that_may_be_traced():
    text = (REPOSITORY / "docs/in_your_program.md").read_text()
    sentence = re.search(r"In a sweep,(.*?)may be traced", text, re.DOTALL)
    traced = {key for key, entry in KEYS.items() if entry.traced}
    assert set(re.findall(r"`(\w+)`", sentence[1])) == traced


def test_the_page_on_architecture_links_to_functions_that_are_there():
    page = REPOSITORY / "docs/architecture.md"
    links = re.findall(r"\[`(\w+)`\]\(([^)]*\.py)\)", page.read_text())
    assert len(links) > 15
    for function, path in links:
        text = (page.parent / path).read_text()
        assert re.search(rf"^ *(def|class) {function}\b", text, re.MULTILINE), (function, path)


def test_the_site_leads_to_every_page():
    navigation = re.findall(r": (\S+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(navigation) == sorted(name(page) for page in LINKING if page.suffix == ".md")


def test_on_the_site_links_to_code_lead_to_github(monkeypatch):
    context = pytest.importorskip("zensical.extensions.context")  # in requirements-docs.txt
    markdown = importlib.import_module("markdown")
    monkeypatch.setenv("REPO_URL", "https://github.com/a/b")
    page = context.Page(url="docs/runs/", path="docs/runs.md")
    extensions = [context.ContextExtension(page=page, config={}), "docs.github_links"]
    to = {
        "../trxl/config.py": "https://github.com/a/b/blob/main/trxl/config.py",
        "../settings": "https://github.com/a/b/blob/main/settings",
        "../../../actions": "https://github.com/a/b/actions",
    }
    stay = ["keys.md", "keys.md#training", "#metrics", "../results_brax/a.png", "https://x.org/a"]
    for target, expected in {**to, **{target: target for target in stay}}.items():
        html = markdown.markdown(f"[a]({target})", extensions=extensions)
        assert f'href="{expected}"' in html
