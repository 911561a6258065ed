"""What is free: of the machine, and within the limits of control groups."""

import pytest
import torch

from xclip_lab import memory


def group(folder, limit, used, idle, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used, f"anon 5\n{names[3]} {idle}"), strict=False):
        (folder / name).write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("line", "top", "names"),
    [
        ("0::/job/step", "", ("memory.max", "memory.current", "memory.stat", "inactive_file")),
        (
            "4:memory:/job/step",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file"),
        ),
    ],
)
def test_control_groups_limit_what_is_free(tmp_path, line, top, names):
    """A file cache that nobody uses is free; a group without a limit says nothing, the one above it does."""
    (tmp_path / "cgroup").write_text(f"1:cpu:/job\n{line}\n")
    root = tmp_path / "fs" / top
    group(root / "job" / "step", "max", 70, 0, names)
    group(root / "job", 100, 70, 20, names)
    group(root, 1000, 70, 20, names)
    group(tmp_path, 1, 1, 0, names)  # above the root of all groups
    assert list(memory._room_in_groups(tmp_path / "cgroup", tmp_path / "fs")) == [50, 950]
    (tmp_path / "cgroup").write_text(line.replace("job", "of the host"))  # as a container may see it
    assert list(memory._room_in_groups(tmp_path / "cgroup", tmp_path / "fs")) == [950]
    assert list(memory._room_in_groups(tmp_path / "nowhere", tmp_path / "fs")) == []


def test_processes_of_a_machine_share_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "_room_in_groups", lambda: [1000])
    assert memory.available_memory() == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_memory(torch.device("cpu")) == 250
