import pytest

from uae.files.locations import local_file, local_folder, locate


@pytest.fixture(autouse=True)
def mirror(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("UAE_CHECKPOINTS", str(tmp_path / "mirror"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mirror/owner/model").mkdir(parents=True)
    (tmp_path / "mirror/owner/model/weights.pth").touch()
    return tmp_path / "mirror"


def test_a_mirror_stands_in_for_the_hub(mirror, monkeypatch):
    assert locate("owner/model") == str(mirror / "owner/model")
    assert local_folder("owner/model", "key") == mirror / "owner/model"
    assert local_file("owner/model/weights.pth", "key") == mirror / "owner/model/weights.pth"
    monkeypatch.delenv("UAE_CHECKPOINTS")
    assert locate("owner/model") == "owner/model"


def test_the_mirror_goes_first_then_a_path(tmp_path, mirror):
    for name in ("owner/model", "owner/other"):
        (tmp_path / name).mkdir(parents=True)
    assert locate("owner/model") == str(mirror / "owner/model")
    assert locate("owner/other") == "owner/other"
    assert locate(str(tmp_path / "owner/model")) == str(tmp_path / "owner/model")


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere", "nowhere", "a/b/c"])
def test_what_can_only_be_a_path_must_exist(name):
    with pytest.raises(FileNotFoundError, match="nothing at .*UAE_CHECKPOINTS="):
        locate(name)


@pytest.mark.parametrize("find", [local_folder, local_file])
@pytest.mark.parametrize("name", ["owner/other", "owner/other/file.pth", "nowhere", "./nowhere"])
def test_what_is_nowhere_is_one_line_that_names_the_key(find, name):
    with pytest.raises(FileNotFoundError, match="set system.init_args.checkpoint") as raised:
        find(name, "system.init_args.checkpoint")
    assert "\n" not in str(raised.value)
    assert repr(name) in str(raised.value)


def test_an_empty_mirror_is_no_reason_to_ask_the_hub(monkeypatch):
    monkeypatch.setenv("UAE_CHECKPOINTS", "")
    with pytest.raises(ValueError, match="the environment variable UAE_CHECKPOINTS is empty"):
        locate("owner/model")
