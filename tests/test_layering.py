"""Which part may import which, read from the sources; and that asking for help does not load torch."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"quant": set(), "cache": set(), "offload": {"quant", "cache"}, "cli": {"offload", "cache"}}
MOST_LINES = 400
# A file imports only files to its left. Those that are not named here are free, as long as nothing goes in circles.
ORDER = {
    "quant": (
        "int4 int8 mxfp4 nf4 codecs kernels native_replay native native_step native_layers "
        "native_edges triton_kernels linear triton_linear"
    ),
    "cache": (
        "expert units json_fields whole_file order published forecast analog hybrid policy eviction "
        "manager plain_cache renewal trace history replay counters notes device_stats saved_stats cost advice machine "
        "routing strategies simulate verdict report sections report_text charts report_html stats "
        "past_runs answer_line self_test"
    ),
    # `hf` stands low: whoever needs to know transformers' internals asks it, so that no other file touches them.
    "offload": (
        "errors native_cache packed_scheme config estimate memory placement contexts workspace outline device pages "
        "simulated_device resident_table source apart template_worker templates checkpoint_files "
        "hub_name naming hub hf_families kv_cache hf_experts hf_norms hf gptq_awq prequantized hf_keys "
        "hf_layers foresight sizes byte_level tiktoken_file checkpoint hub_source fit convert store "
        "tiers ram_table uploads transfer predictor prefetch warm_start reads recorder choices recovery "
        "runtime below admissions after_prompt device_runtime device_tier planning lean reasoning "
        "generate tokenizer model gguf_file gguf_config gguf_tensor gguf_tokenizer gguf_llama "
        "gguf_source gguf_hub loading demo_store demo outline_reader outline_cache outlook probe survey "
        "benchmark doctor"
    ),
}
FILES = sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py"))
IDS = [path.relative_to(ROOT).as_posix() for path in FILES]


def statements(node: ast.AST, for_types: bool) -> Iterator[ast.AST]:
    """Everything in `node`, without the bodies of `if TYPE_CHECKING:` unless `for_types`."""
    yield node
    skip = not for_types and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    for child in node.orelse if skip else ast.iter_child_nodes(node):  # type: ignore[attr-defined]
        yield from statements(child, for_types)


def imports(path: Path, root: Path = ROOT, for_types: bool = True) -> Iterator[tuple[str, ...]]:
    """Every import in a file, anywhere in it, as absolute name parts; our own start with "pocketmoe"."""
    package = ("pocketmoe", *path.relative_to(root).parent.parts)
    for node in statements(ast.parse(path.read_text(encoding="utf-8"), str(path)), for_types):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, alias.name) for alias in node.names)


def own(path: Path, root: Path = ROOT, for_types: bool = True) -> set[tuple[str, str]]:
    """(part, file) of every import of our own; a package imported as a whole has file ""."""
    names = imports(path, root, for_types)
    return {(*name[1:3], "", "")[:2] for name in names if name[0] == "pocketmoe"}  # type: ignore[misc]


def wrong_order(path: Path, root: Path = ROOT) -> set[str]:
    """Files of its own part that `path` imports although they do not lie above it."""
    part = path.relative_to(root).parts[0]
    order = ORDER.get(part, "").split()
    if path.stem not in order:
        return set()
    below = set(order[order.index(path.stem) :])
    return {name for other, name in own(path, root, for_types=False) if other == part and name in below}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_part_imports_only_the_parts_below_it(path):
    part = path.relative_to(ROOT).parts[0]
    assert {other for other, _ in own(path)} <= PARTS[part] | {part}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_file_imports_only_files_above_it_in_its_part(path):
    assert wrong_order(path) == set()


@pytest.mark.parametrize("part", PARTS)
def test_no_file_imports_itself_through_others(part):
    graph = {
        path.stem: {name for other, name in own(path, for_types=False) if other == part}
        for path in (ROOT / part).glob("*.py")
    }
    del graph["__init__"]  # it may load anything, late, for whoever uses the part from outside
    TopologicalSorter(graph).prepare()  # raises CycleError and names the circle


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_parts_are_never_imported_by_their_bare_folder_names(path):
    """From the repository's root that would work, and make a second copy of every class."""
    assert {name[0] for name in imports(path)} & set(PARTS) == set()


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "cache"], ids=lambda path: path.name)
def test_the_cache_needs_no_torch_and_other_libraries_only_where_they_are_due(path):
    foreign = {name[0] for name in imports(path)} - {"pocketmoe", "__future__"} - sys.stdlib_module_names
    with_numpy = {"analog", "cost", "trace", "replay", "routing"}
    assert foreign <= ({"numpy"} if path.stem in with_numpy else {"rich"} if path.stem == "report_text" else set())


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_file_is_too_long_to_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_these_tests_notice_every_way_to_import(tmp_path):
    path = tmp_path / "offload/store.py"
    path.parent.mkdir()
    path.write_text(
        """
if TYPE_CHECKING:
    from .transfer import Ticket
from . import errors, runtime
from .model import load
from .. import quant
from ..cli.main import main
from pocketmoe.cache.stats import RunStats
import cache.policy
def late():
    import pocketmoe.offload.demo
"""
    )
    assert own(path, tmp_path) == {
        ("offload", "errors"),
        ("offload", "runtime"),
        ("offload", "transfer"),
        ("offload", "model"),
        ("offload", "demo"),
        ("cli", "main"),
        ("quant", ""),
        ("cache", "stats"),
    }
    assert wrong_order(path, tmp_path) == {"runtime", "model", "demo"}
    assert "cache" in {name[0] for name in imports(path, tmp_path)}


def test_the_command_line_is_imported_without_torch_and_transformers():
    if not (ROOT / "cli/main.py").exists() or importlib.util.find_spec("pocketmoe") is None:
        pytest.skip("there is no command line yet, or the package is not installed")
    program = (
        "import sys, pocketmoe.cli.main; print(*sorted({name.split('.')[0] for name in sys.modules} & "
        "{'torch', 'transformers'}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
