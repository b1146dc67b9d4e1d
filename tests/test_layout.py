"""The repository keeps its shape: a fixed top level, small files, scripts that work."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TOP_LEVEL = {"cmpt", "recipes", "tools", "tests", "hostfile.example", "pyproject.toml", "README.md", "LICENSE"}
CODE_LINES_LIMIT = 400
SHIPPED_DATA_LIMIT_BYTES = 16 * 2**20


def repository_files() -> list[Path]:
    """Tracked files and those that would be: relative paths, without what git ignores."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in sorted(set(listed.split("\0"))) if name and (REPOSITORY / name).is_file()]


def first_line(path: Path) -> bytes:
    with (REPOSITORY / path).open("rb") as file:
        return file.readline()


def is_script(path: Path) -> bool:
    return first_line(path).startswith(b"#!")


def is_code(path: Path) -> bool:
    return path.suffix in (".py", ".sh") or is_script(path)


def command_line_tools() -> list[str]:
    tools = REPOSITORY / "tools"
    python = [file for file in tools.glob("*.py") if "__main__" in file.read_text(encoding="utf-8")]
    return [f"tools/{file.name}" for file in sorted([*python, tools / "quickstart", tools / "test"])]


def test_top_level_holds_nothing_else() -> None:
    names = {path.parts[0] for path in repository_files()}
    extra = {name for name in names - TOP_LEVEL if not name.startswith(".")}
    assert not extra, f"not part of the fixed top level: {sorted(extra)}"


def test_code_files_are_small() -> None:
    lengths = {
        str(path): len((REPOSITORY / path).read_bytes().splitlines())
        for path in repository_files()
        if path.parts[0] in ("cmpt", "tools") and is_code(path)
    }
    long = {path: length for path, length in lengths.items() if length > CODE_LINES_LIMIT}
    assert not long, f"longer than {CODE_LINES_LIMIT} lines: {long}"


def test_no_file_is_named_utils() -> None:
    assert not [str(path) for path in repository_files() if path.stem in ("utils", "util")]


def test_shipped_data_is_small() -> None:
    sizes = {
        str(path): (REPOSITORY / path).stat().st_size
        for path in repository_files()
        if path.parts[0] == "cmpt" and not is_code(path)
    }
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    assert sum(sizes.values()) <= SHIPPED_DATA_LIMIT_BYTES, f"{sum(sizes.values())} bytes; the largest: {largest}"


def test_shell_scripts_parse() -> None:
    scripts = [
        path for path in repository_files() if path.suffix == ".sh" or (is_script(path) and b"bash" in first_line(path))
    ]
    assert Path("tools/test") in scripts
    for path in scripts:
        result = subprocess.run(["bash", "-n", path], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


def test_scripts_are_executable_and_nothing_else_is() -> None:
    wrong = [
        str(path)
        for path in repository_files()
        if is_script(path) != os.access(REPOSITORY / path, os.X_OK) and not (REPOSITORY / path).is_symlink()
    ]
    assert not wrong, f"first line #! and executable bit go together: {wrong}"


@pytest.mark.parametrize("tool", command_line_tools())
def test_tool_explains_itself(tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if tool.endswith(".py"):  # in this process, which has imported torch: it takes seconds
        monkeypatch.chdir(REPOSITORY)
        monkeypatch.setattr(sys, "argv", [tool, "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(tool, run_name="__main__")
        assert not ended.value.code and "usage" in capsys.readouterr().out.lower()
        return
    result = subprocess.run(["bash", tool, "--help"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower()
