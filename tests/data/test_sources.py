from __future__ import annotations

import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parcnn.data import load, names
from parcnn.data.published import PUBLISHED, RemoteFile
from parcnn.errors import ArgumentError, DataError, DataUnavailableError, LabelError
from tests.data.files import TINY, cifar_archive, cifar_files, random_images, write_cifar, write_idx, write_mnist
from tests.data.server import Server, serve

MNIST, FASHION, CIFAR10, CIFAR100 = (TINY[name] for name in ("mnist", "fashion-mnist", "cifar10", "cifar100"))


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny sets in place of the published ones, and an empty cache folder, which is returned; no proxy."""
    for name, published in TINY.items():
        monkeypatch.setitem(PUBLISHED, name, published)
    monkeypatch.delenv("PARCNN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "home" / "parcnn" / "data"


def check(name: str, data_dir: Path | None, seed: int = 0, **options: object) -> None:
    """Both splits are what was written, normalised by the training split."""
    expected_train, _ = random_images(TINY[name], "train", seed)
    for split in ("train", "test"):
        images, labels = random_images(TINY[name], split, seed)
        got = load(name, split, data_dir, **options)  # type: ignore[arg-type]
        np.testing.assert_array_equal(got.images, images, strict=True)
        np.testing.assert_array_equal(got.labels, labels.astype(np.int32), strict=True)
        assert (got.name, got.split, got.classes) == (name, split, TINY[name].classes)
        np.testing.assert_allclose(got.mean, (expected_train / 255).mean(axis=(0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(got.std, (expected_train / 255).std(axis=(0, 2, 3)), rtol=1e-12)


def test_names() -> None:
    assert names() == ("mnist", "fashion-mnist", "cifar10", "cifar100", "digits")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "mnist"), ("mnist", "."), ("mnist", "MNIST/raw"),
        ("fashion-mnist", "fashion-mnist"), ("fashion-mnist", "."), ("fashion-mnist", "FashionMNIST/raw"),
    ],
)  # fmt: skip
def test_idx_layouts(tmp_path: Path, name: str, folder: str, suffix: str) -> None:
    write_mnist(tmp_path / "d" / folder, TINY[name], suffix)
    check(name, tmp_path / "d", download=False)


def test_names_with_a_dot_are_found(tmp_path: Path) -> None:
    write_mnist(tmp_path, MNIST)
    for path in list(tmp_path.glob("*-idx*")):
        path.rename(tmp_path / path.name.replace("-idx", ".idx"))
    check("mnist", tmp_path, download=False)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("cifar10", "cifar-10-batches-bin"), ("cifar10", "cifar10"), ("cifar10", "cifar10/cifar-10-batches-bin"),
        ("cifar10", "."), ("cifar100", "cifar-100-binary"), ("cifar100", "cifar100"), ("cifar100", "."),
    ],
)  # fmt: skip
def test_cifar_layouts(tmp_path: Path, name: str, folder: str) -> None:
    write_cifar(tmp_path / "d" / folder, TINY[name])
    check(name, tmp_path / "d", download=False)


@pytest.mark.parametrize("published", [CIFAR10, CIFAR100], ids=lambda p: p.name)
@pytest.mark.parametrize("folder", [".", "own"])
def test_a_published_archive_is_unpacked(tmp_path: Path, published, folder: str) -> None:
    place = tmp_path / "d" / (published.name if folder == "own" else ".")
    place.mkdir(parents=True)
    (place / published.downloads[0].name).write_bytes(cifar_archive(published))
    check(published.name, tmp_path / "d", download=False)
    assert {p.name for p in (place / published.folders[0]).iterdir()} == set(cifar_files(published))


def test_an_unpacking_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    (tmp_path / CIFAR10.downloads[0].name).write_bytes(cifar_archive(CIFAR10))
    write_cifar(tmp_path / CIFAR10.folders[0], CIFAR10)
    (tmp_path / CIFAR10.folders[0] / "data_batch_4.bin").unlink()
    check("cifar10", tmp_path, download=False)


def test_the_order_is_argument_then_variable_then_cache(
    tmp_path: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, folder in enumerate([tmp_path / "argument", tmp_path / "variable", places]):
        write_mnist(folder / "mnist", MNIST, seed=seed)
    monkeypatch.setenv("PARCNN_DATA", str(tmp_path / "variable"))
    check("mnist", tmp_path / "argument", seed=0, download=False)
    check("mnist", None, seed=1, download=False)
    monkeypatch.setenv("PARCNN_DATA", "")
    check("mnist", None, seed=2, download=False)
    assert load("mnist", download=False).source == str(places / "mnist")


def test_a_folder_without_the_set_is_passed_over_with_a_notice(tmp_path: Path, places: Path) -> None:
    write_mnist(places / "mnist", MNIST)
    (tmp_path / "empty").mkdir()
    told: list[str] = []
    load("mnist", data_dir=tmp_path / "empty", notice=told.append)
    assert told == [f"mnist is not in {tmp_path / 'empty'}"]


def test_changed_training_files_change_the_normalisation(tmp_path: Path) -> None:
    write_mnist(tmp_path, MNIST, seed=0)
    check("mnist", tmp_path, seed=0)
    write_mnist(tmp_path, MNIST, seed=1)
    later = time.time() + 5
    for path in tmp_path.glob("*-ubyte"):
        os.utime(path, (later, later))
    test = load("mnist", "test", tmp_path)
    assert test.mean[0] == pytest.approx((random_images(MNIST, "train", 1)[0] / 255).mean(), rel=1e-12)


@pytest.mark.parametrize("variable", [False, True])
def test_a_data_folder_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: bool) -> None:
    folder = tmp_path / "typo"
    if variable:
        monkeypatch.setenv("PARCNN_DATA", str(folder))
    with pytest.raises(DataError, match=rf"{'PARCNN_DATA' if variable else 'data folder'} .*typo: is not a folder"):
        load("mnist", data_dir=None if variable else folder)


def test_nowhere_and_no_download_says_what_to_do(tmp_path: Path, places: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataUnavailableError) as caught:
        load("cifar10", data_dir=tmp_path / "empty", download=False)
    message = str(caught.value)
    for part in ("cifar10", str(tmp_path / "empty"), str(places), "cifar-10-binary.tar.gz", "PARCNN_DATA", "digits"):
        assert part in message


@pytest.mark.parametrize("gone", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_a_companion_that_is_missing_is_named(tmp_path: Path, gone: str) -> None:
    write_mnist(tmp_path / "mnist", MNIST)
    (tmp_path / "mnist" / gone).unlink()
    with pytest.raises(DataError, match=f"{gone} is missing"):
        load("mnist", data_dir=tmp_path)
    with pytest.raises(DataError, match=f"{gone} is missing"):  # the test split needs them too, to be normalised
        load("mnist", "test", data_dir=tmp_path)


def test_a_cifar_batch_that_is_missing_is_named(tmp_path: Path) -> None:
    write_cifar(tmp_path, CIFAR10)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin is missing"):
        load("cifar10", data_dir=tmp_path)


def test_a_test_split_without_its_training_files(tmp_path: Path) -> None:
    write_cifar(tmp_path, CIFAR10)
    for path in tmp_path.glob("data_batch*"):
        path.unlink()
    with pytest.raises(DataError, match=r"training files of cifar10 are missing(.|\n)*normalised"):
        load("cifar10", "test", data_dir=tmp_path)


def test_images_and_labels_of_different_splits(tmp_path: Path) -> None:
    write_mnist(tmp_path, MNIST)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes((tmp_path / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(
        DataError, match=r"train-images(.|\n)*differ in count(.|\n)*30 labels in .*train-labels(.|\n)*20"
    ):
        load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize("shape", [(29, 28, 28), (30, 27, 28), (30, 28, 1)])
def test_a_set_of_another_size_than_published(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    write_mnist(tmp_path, MNIST)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros(shape, np.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(shape[0], np.uint8))
    with pytest.raises(DataError, match=r"train-images(.|\n)*not the size of mnist train(.|\n)*\(30, 28, 28\)"):
        load("mnist", data_dir=tmp_path)


def test_a_cifar_file_cut_between_two_records(tmp_path: Path) -> None:
    write_cifar(tmp_path, CIFAR10)
    path = tmp_path / "data_batch_5.bin"
    path.write_bytes(path.read_bytes()[:-3073])
    with pytest.raises(DataError, match=r"data_batch_5(.|\n)*6 images(.|\n)*5"):
        load("cifar10", data_dir=tmp_path)


def test_a_label_out_of_range_names_the_labels_file(tmp_path: Path) -> None:
    write_mnist(tmp_path, MNIST)
    labels = np.zeros(30, np.uint8)
    labels[17] = 10
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels)
    with pytest.raises(LabelError, match=r"train-labels-idx1-ubyte(.|\n)*label 10 at index 17"):
        load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize(("asked", "there"), [(MNIST, FASHION), (FASHION, MNIST)], ids=["mnist", "fashion"])
def test_the_other_set_of_the_same_file_names_is_not_taken_for_this_one(tmp_path: Path, asked, there) -> None:
    write_mnist(tmp_path, MNIST)
    for split, (_, labels_name) in there.files.items():
        labels = np.resize(np.array(there.first_labels[split], np.uint8), there.counts[split])
        write_idx(tmp_path / labels_name, labels)
    assert load(there.name, data_dir=tmp_path).name == there.name
    for split in ("train", "test"):
        with pytest.raises(DataError, match=f"these are the files of {there.name}"):
            load(asked.name, split, data_dir=tmp_path)


@pytest.mark.parametrize(("name", "guess"), [("cifar-10", "cifar10"), ("FashionMNIST", "fashion-mnist")])
def test_an_unknown_name_gets_a_guess(name: str, guess: str) -> None:
    with pytest.raises(ArgumentError, match=rf"unknown data set '{name}'(.|\n)*did you mean '{guess}'"):
        load(name)


@pytest.mark.parametrize("name", ["imagenet-of-mars", ""])
def test_an_unknown_name_lists_what_there_is(name: str) -> None:
    with pytest.raises(ArgumentError, match="mnist, fashion-mnist, cifar10, cifar100, digits"):
        load(name)


def test_an_unknown_split() -> None:
    for name in ("digits", "mnist", "folder:."):
        with pytest.raises(ArgumentError, match="'valid'"):
            load(name, "valid")


def test_a_size_for_a_published_set() -> None:
    with pytest.raises(ArgumentError, match="only the images of a folder are resized"):
        load("digits", size=(32, 32))


def serve_set(server: Server, published, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has `contents`, and the set knows that it has."""
    server.files = {f"/{name}": content for name, content in contents.items()}
    downloads = tuple(RemoteFile(n, len(c), hashlib.sha256(c).hexdigest()) for n, c in contents.items())
    monkeypatch.setitem(PUBLISHED, published.name, replace(published, downloads=downloads, mirrors=(server.url,)))


def mnist_contents(folder: Path) -> dict[str, bytes]:
    write_mnist(folder, MNIST, ".gz")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_mnist_is_downloaded_once(tmp_path: Path, places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Server()) as server:
        serve_set(server, MNIST, mnist_contents(tmp_path / "origin"), monkeypatch)
        told: list[str] = []
        check("mnist", None, notice=told.append)
        assert len(server.requests) == 4
        assert told == [f"downloading mnist (0 MB) into {places / 'mnist'}"]
        check("mnist", None)
        assert len(server.requests) == 4
    check("mnist", None, download=False)


def test_a_file_deleted_from_the_cache_is_downloaded_again(
    tmp_path: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(Server()) as server:
        serve_set(server, MNIST, mnist_contents(tmp_path / "origin"), monkeypatch)
        load("mnist")
        (places / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
        server.requests.clear()
        check("mnist", None)
        assert [path for path, _ in server.requests] == ["/t10k-labels-idx1-ubyte.gz"]


def test_a_download_that_was_cut_between_two_files_goes_on(
    tmp_path: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(Server()) as server:
        serve_set(server, MNIST, mnist_contents(tmp_path / "origin"), monkeypatch)
        last = server.files.pop("/train-labels-idx1-ubyte.gz")
        with pytest.raises(DataUnavailableError, match=r"train-labels-idx1-ubyte.gz could not(.|\n)*HTTP 404"):
            load("mnist")
        server.files["/train-labels-idx1-ubyte.gz"] = last
        server.requests.clear()
        check("mnist", None)
        assert [path for path, _ in server.requests] == ["/train-labels-idx1-ubyte.gz"]


def test_cifar_is_downloaded_and_unpacked(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Server()) as server:
        serve_set(server, CIFAR100, {"cifar-100-binary.tar.gz": cifar_archive(CIFAR100)}, monkeypatch)
        check("cifar100", None)
    assert (places / "cifar100" / "cifar-100-binary" / "train.bin").is_file()


def test_no_network_says_so_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Server()) as server:
        pass  # now nobody listens at that port
    monkeypatch.setitem(PUBLISHED, "mnist", replace(MNIST, mirrors=(server.url, server.url)))
    with pytest.raises(DataUnavailableError, match=r"mnist is not on this machine(.|\n)*refused(.|\n)*digits"):
        load("mnist")
