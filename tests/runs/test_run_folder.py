import subprocess
import sys
from pathlib import Path

import pytest

from sparsify.runs.run_folder import (
    check_save_dir,
    create_run_folder,
    held_run_folder,
    replace_atomically,
    write_config,
    write_text,
)
from sparsify.settings.base_config import UserError, read_yaml
from sparsify.training.config import TrainingConfig


def test_run_folders_of_one_second_differ(tmp_path: Path):
    folders = {create_run_folder(tmp_path / "new" / "out", "run") for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.is_dir() and folder.name.startswith("run_20") for folder in folders)


def test_unwritable_save_dir_is_refused_and_nothing_is_left(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        UserError, match=r"save_dir: cannot write to '.*file/out' \(Not a directory\); choose"
    ):
        create_run_folder(tmp_path / "file" / "out", "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_checking_a_save_dir_leaves_nothing(tmp_path: Path):
    check_save_dir(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../up", "a/b", "/root", "a\\b", "."])
def test_run_name_cannot_leave_the_save_dir(name: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"wandb_run_name: .* must have no slash"):
        create_run_folder(tmp_path / "out", name)
    assert list(tmp_path.iterdir()) == []


def test_failing_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def write_half() -> None:
        with replace_atomically(path) as temporary:
            temporary.write_text("half of the n")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_half()
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file.txt"]


def test_config_is_written_as_it_can_be_loaded(tmp_path: Path):
    config = TrainingConfig(n_samples=8, batch_size=2, lr=1e-3, save_dir=tmp_path)
    assert TrainingConfig.model_validate(read_yaml(write_config(tmp_path, config))) == config


def test_a_folder_is_held_by_one_process(tmp_path: Path):
    hold = "import sys, pathlib; from sparsify.runs.run_folder import held_run_folder\n"
    hold += "with held_run_folder(pathlib.Path(sys.argv[1])): print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        message = rf"^resume: another process trains in '{tmp_path}'; wait until it ends, or stop"
        with pytest.raises(UserError, match=message), held_run_folder(tmp_path):
            pass
        process.kill()
    with held_run_folder(tmp_path):
        pass


def test_a_link_to_nowhere_is_no_folder_to_write_to(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"^save_dir: cannot write to '.*link' \(File exists\)"):
        create_run_folder(tmp_path / "link", "run")
