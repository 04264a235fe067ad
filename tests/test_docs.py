"""The docs: links lead somewhere, commands are given by a test or say what they need, messages are the program's."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from sweep.cli.app import app
from sweep.config.schema import parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = "".join(
    path.read_text()
    for part in ("sweep", "model", "data", "infra")
    for path in (ROOT / part).rglob("*.*")
    if path.suffix in (".py", ".sbatch", ".sh")
)
# Files that give a command to the program, to other folders. The verbs of the README are given as they stand there.
GIVEN = {
    "sweep predict": "tests/sweep/test_predict.py",
    "sweep prepare": "tests/sweep/test_prepare.py",
    "sweep codebooks": "tests/sweep/test_codebook.py",
    "sweep train trial.yaml": "tests/sweep/test_codebook.py",
    "sweep evaluate seven": "tests/sweep/test_codebook.py",
    "make install": "Makefile",
    "optuna-dashboard": "tests/sweep/test_optuna_dashboard.py",
    "infra/mlflow/": "tests/infra/test_mlflow_server.py",
    "python infra/k8s/validate.py": "tests/infra/test_k8s.py",
}
NEEDS = re.compile(
    r"needs (docker|a cluster|Slurm|Docker, and a cluster|an account|a Ray cluster|Apptainer|root|a server)"
)


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def commands(page: Path) -> list[tuple[str, str]]:
    """Command lines of a page's shell blocks, each with its comment, or that of the whole block above it."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
        whole = ""
        for line in block.replace("\\\n", " ").splitlines():
            words, _, comment = line.partition("# ") if line[:1] == "#" else line.partition("  #")
            whole += "" if words else comment
            found += [(words.strip(), whole + comment)] if words.strip() else []
    return found


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        found = page.parent / target if target else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_commands_have_the_options_they_are_given(page: Path) -> None:
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line, _ in commands(page):
        words = shlex.split(line.replace("[", "").replace("]", ""))
        if words[0] != "sweep":
            continue
        verb = verbs[words[1]]
        verb = getattr(verb, "commands", {}).get(words[2], verb) if len(words) > 2 else verb
        known = {option for parameter in verb.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("page", PAGES[2:], ids=names(PAGES[2:]))
def test_commands_are_given_by_a_test_or_say_what_they_need(page: Path) -> None:
    shown = {line.split(" -")[0].rpartition(" ")[0] for line, _ in commands(PAGES[0])}
    for line, comment in commands(page):
        given = [path for start, path in GIVEN.items() if line.startswith(start)]
        shown_there = any(line.startswith(f"{start} ") for start in shown if start)
        said = NEEDS.search(comment) or line.startswith("export ")
        assert given or shown_there or said, f"{line}: no test gives it, and nothing says what it needs"
        assert all((ROOT / path).exists() for path in given)


def test_example_of_a_configuration_is_valid() -> None:
    (block,) = re.findall(r"```yaml\n(name: .*?)```", (ROOT / "docs/sweep.md").read_text(), flags=re.DOTALL)
    config = parse(yaml.safe_load(block), "docs/sweep.md")
    assert len(config.search.space) == 6


def test_runbook_quotes_messages_of_the_program() -> None:
    text = (ROOT / "docs/cluster.md").read_text().partition("## Runbook")[2]
    rows = re.findall(r"^\| ([^|]+) \|", text, flags=re.MULTILINE)[2:]
    assert len(rows) > 12
    for quoted in (words for row in rows for words in re.findall(r"`([^`]+)`", row)):
        for part in re.split(r" ?…,? ?| N ", quoted):
            assert part.strip(":, ") in SOURCES, quoted


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_files_and_symbols_that_pages_name_exist(page: Path) -> None:
    """As `model/training/trainer.py:fit`, or a file or folder alone."""
    named = re.findall(r"`((?:data|model|sweep|tests|infra|docs)/[\w./-]+)(?::(\w+))?`", page.read_text())
    for path, symbol in named:
        assert (ROOT / path).exists(), path
        defined = rf"^(?:def|class) {symbol}\b|^{symbol} = "
        assert not symbol or re.search(defined, (ROOT / path).read_text(), re.MULTILINE), symbol


def test_architecture_names_every_folder() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    folders = {
        path.parent.relative_to(ROOT).as_posix()
        for top in ("data", "model", "sweep")
        for path in (ROOT / top).rglob("*.py")
    }
    assert not [folder for folder in sorted(folders) if f"`{folder}" not in text]
