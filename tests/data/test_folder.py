from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

import parcnn.data.folder as module
from parcnn.data import from_folder, load
from parcnn.data.image import decode
from parcnn.errors import ArgumentError, DataError, ShapeError, UnsupportedError

Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)


def picture(path: Path, shape: tuple[int, ...] = (6, 9, 3)) -> np.ndarray:
    """A random image of (H, W) or (H, W, C)."""
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def flat(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Seven cats and eight dogs, and what is not an image."""
    folder = tmp_path / "pets"
    made = {}
    for name, count in (("dog", 8), ("cat", 7)):
        for i in range(count):
            made[f"{name}/{i}.png"] = picture(folder / name / f"{i}.png")
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / "cat" / ".hidden.png").write_text("not an image")
    (folder / ".git").mkdir()
    return folder, made


def test_a_flat_folder_is_split_the_same_way_every_time(flat: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, made = flat
    train, test = from_folder(folder), from_folder(folder, split="test")
    assert (len(train), len(test)) == (12, 3)
    assert train.classes == test.classes == ("cat", "dog")
    assert (train.name, train.shape, train.source) == ("pets", (3, 6, 9), str(folder))
    assert set(test.labels.tolist()) == {0, 1}
    pixels = {name: image.transpose(2, 0, 1).tobytes() for name, image in made.items()}
    got = {}
    for data in (train, test):
        for image, label in zip(data.images, data.labels, strict=True):
            name = next(n for n, p in pixels.items() if p == image.tobytes())
            assert name.startswith(data.classes[label])
            got[name] = data.split
    assert set(got) == set(made)
    np.testing.assert_array_equal(from_folder(folder).images, train.images)
    assert (train.mean, train.std) == (test.mean, test.std)
    np.testing.assert_allclose(train.mean, (train.images / 255).mean(axis=(0, 2, 3)), rtol=1e-12)


def test_images_are_decoded_once_for_both_splits(
    flat: tuple[Path, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, decoded = flat[0], list[str]()

    def watched(file: Path, mode: str, size: tuple[int, int]) -> np.ndarray:
        decoded.append(f"{file.parent.name}/{file.name}")
        return decode(file, mode, size)

    monkeypatch.setattr(module, "decode", watched)
    train, test = from_folder(path), from_folder(path, split="test")
    assert sorted(decoded) == sorted(flat[1])
    assert (test.mean, test.std) == (train.mean, train.std)
    changed = path / "cat" / "1.png"
    picture(changed)
    os.utime(changed, ns=(1, 1))
    again = from_folder(path, split="test")
    assert again.mean != train.mean, "of the training images as they are now"
    assert again.mean == from_folder(path).mean
    smaller = from_folder(path, split="test", size=(3, 4))
    assert smaller.mean == from_folder(path, size=(3, 4)).mean != again.mean


def test_test_every(flat: tuple[Path, dict[str, np.ndarray]]) -> None:
    assert len(from_folder(flat[0], split="test", test_every=2)) == 8
    with pytest.raises(ArgumentError, match="test_every"):
        from_folder(flat[0], test_every=1)


def test_train_and_test_folders_are_the_splits(tmp_path: Path) -> None:
    a = picture(tmp_path / "train" / "a" / "deep" / "1.PNG")
    picture(tmp_path / "train" / "b" / "1.png")
    b = picture(tmp_path / "test" / "b" / "2.png")
    train, test = from_folder(tmp_path, name="mine"), from_folder(tmp_path, split="test")
    np.testing.assert_array_equal(train.images[0], a.transpose(2, 0, 1))
    np.testing.assert_array_equal(test.images, b.transpose(2, 0, 1)[None])
    assert train.labels.tolist() == [0, 1]
    assert test.labels.tolist() == [1]
    assert train.name == "mine"
    assert (train.mean, train.std) == (test.mean, test.std)


def test_a_test_class_that_was_not_trained(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a" / "1.png")
    picture(tmp_path / "test" / "b" / "1.png")
    with pytest.raises(DataError, match=r"class 'b' is not among the training classes(.|\n)*a"):
        from_folder(tmp_path)


def test_a_training_split_without_its_test_split_is_not_taken_for_a_class(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for i in range(3):
                picture(tmp_path / split / name / f"{i}.png")
    with pytest.raises(DataError, match="no folder 'test'"):
        from_folder(tmp_path)
    assert from_folder(tmp_path / "train").classes == ("cat", "dog")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("car", "train"):
        for i in range(3):
            picture(tmp_path / name / f"{i}.png")
    assert from_folder(tmp_path).classes == ("car", "train")


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    grey = [picture(tmp_path / "a" / f"{i}.png", (4, 5)) for i in range(5)]
    data = from_folder(tmp_path)
    assert data.shape == (1, 4, 5)
    np.testing.assert_array_equal(data.images[0, 0], grey[1])


def test_one_coloured_training_image_makes_all_rgb_and_alpha_is_dropped(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "0.png", (4, 5))
    grey = picture(tmp_path / "a" / "1.png", (4, 5))
    rgba = picture(tmp_path / "a" / "2.png", (4, 5, 4))
    data = from_folder(tmp_path)
    assert data.shape == (3, 4, 5)
    np.testing.assert_array_equal(data.images[0], np.stack([grey] * 3))
    np.testing.assert_array_equal(data.images[1], rgba[..., :3].transpose(2, 0, 1))


def test_sizes_must_agree_or_be_given(tmp_path: Path) -> None:
    for i in range(5):
        picture(tmp_path / "a" / f"{i}.png", (8, 6, 3))
    picture(tmp_path / "b" / "odd.png", (6, 8, 3))
    with pytest.raises(ShapeError, match=r"odd\.png(.|\n)*\(8, 6\)(.|\n)*\(6, 8\)(.|\n)*size="):
        from_folder(tmp_path)
    data = from_folder(tmp_path, size=(4, 3))
    assert data.shape == (3, 4, 3)
    assert len(data) == 4


def test_resizing_keeps_a_constant_image_and_orientation(tmp_path: Path) -> None:
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, 6:] = 255  # dark left, bright right
    for i in range(2):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "a" / f"{i}.png")
    image = from_folder(tmp_path, size=(2, 6)).images[0]
    np.testing.assert_array_equal(image[:, :, [0, 1]], 0)
    np.testing.assert_array_equal(image[:, :, [4, 5]], 255)


@pytest.mark.parametrize("size", [(0, 4), (4, -1)])
def test_a_size_that_cannot_be(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(ArgumentError, match="that size"):
        from_folder(tmp_path, size=size)


def test_no_folder_no_classes_no_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: there is no such folder"):
        from_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no classes"):
        from_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match=r"cat: a class has no images(.|\n)*\.png"):
        from_folder(tmp_path)
    picture(tmp_path / "cat" / "1.png")
    with pytest.raises(DataError, match="too few images"):
        from_folder(tmp_path)


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "corrupt"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, kind: str, suffix: str) -> None:
    for i in range(3):
        picture(tmp_path / "a" / f"{i}.{suffix}", (40, 40, 3))
    bad = tmp_path / "a" / f"1.{suffix}"
    good = bad.read_bytes()
    bad.write_bytes(
        {"text": b"hello", "empty": b"", "cut": good[: len(good) // 2], "corrupt": good[:30] + bytes(60)}[kind]
    )
    with pytest.raises(DataError, match=rf"1\.{suffix}: "):
        from_folder(tmp_path)


def test_sixteen_bits_are_not_cut_to_eight_silently(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i in range(2):
        Image.fromarray(RNG.integers(0, 65536, (4, 4)).astype(np.uint16)).save(tmp_path / "a" / f"{i}.png")
    with pytest.raises(UnsupportedError, match=r"[01]\.png(.|\n)*8 bits"):
        from_folder(tmp_path)


def test_without_pillow_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a" / "1.png")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UnsupportedError, match=r"install pillow"):
        from_folder(tmp_path)


def test_load_takes_a_path_and_a_prefix(
    flat: tuple[Path, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = flat
    for name in (str(folder), f"folder:{folder}"):
        assert load(name, "test", size=(5, 5)).shape == (3, 5, 5)
    monkeypatch.chdir(folder.parent)
    assert load("pets").name == "pets"
    assert load("folder:pets").name == "pets"
    with pytest.raises(DataError, match="no such folder"):
        load("folder:nothing")
