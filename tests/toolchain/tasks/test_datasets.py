from __future__ import annotations

import gzip
import io
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.toolchain.tasks.image_doubles import RNG, write_classes, write_image
from tests.toolchain.tasks.public_home import served
from toolchain import download
from toolchain.tasks import readers
from toolchain.tasks.classification import DataSection, prepare
from toolchain.tasks.datasets import DataError, Pool, Source, decode, draw, split
from toolchain.tasks.segmentation import DataSection as MaskSection
from toolchain.tasks.segmentation import prepare as prepare_masks


def own(root: Path, **keys: Any) -> Any:
    return prepare(DataSection(source="folder", path=str(root), image_size=8, **keys))


# Splits


def section(**keys: Any) -> DataSection:
    return DataSection(source="digits", **keys)


def numbered(labels: np.ndarray) -> Source:
    """A source whose image i is the number i."""
    pool = Pool(labels.astype(np.int64), lambda i: np.array([[i]]))
    return Source("numbers", [str(k) for k in range(int(labels.max()) + 1)], {"train": pool})


def members(pool: Pool) -> list[int]:
    return [int(pool.image(i)[0, 0]) for i in range(len(pool))]


def test_splits_are_disjoint_stratified_and_reproducible() -> None:
    labels = np.repeat([0, 1, 2], [100, 60, 40])
    pools = split(numbered(labels), section(val_fraction=0.1, test_fraction=0.2))
    assert {name: len(pool) for name, pool in pools.items()} == {"train": 144, "val": 16, "test": 40}
    everything = [i for pool in pools.values() for i in members(pool)]
    assert sorted(everything) == list(range(200))
    assert np.bincount(pools["test"].labels).tolist() == [20, 12, 8]
    assert np.bincount(pools["val"].labels).tolist() == [8, 5, 3]
    assert all((labels[members(pool)] == pool.labels).all() for pool in pools.values())
    assert members(split(numbered(labels), section())["val"]) == members(pools["val"])
    assert members(split(numbered(labels), section(split_seed=1))["val"]) != members(pools["val"])


def test_train_samples_is_balanced_and_leaves_the_other_splits() -> None:
    labels = np.repeat([0, 1, 2], [300, 300, 10])
    whole, few = split(numbered(labels), section()), split(numbered(labels), section(train_samples=50))
    assert np.bincount(few["train"].labels).tolist() == [22, 21, 7]
    assert set(members(few["train"])) < set(members(whole["train"]))
    assert members(few["test"]) == members(whole["test"])
    with pytest.raises(DataError, match=r"train_samples: expected at most 439 .* found 440"):
        split(numbered(labels), section(train_samples=440))


def test_draw_takes_each_class_by_its_share() -> None:
    labels = np.repeat([0, 1], [90, 10])
    assert np.bincount(labels[draw(labels, 20, [0])]).tolist() == [18, 2]
    assert np.bincount(labels[draw(labels, 20, [0], balanced=True)]).tolist() == [10, 10]


def test_splits_that_cannot_be() -> None:
    with pytest.raises(DataError, match="no training images of class 1"):
        split(numbered(np.array([0] * 20 + [2] * 20)), section())
    with pytest.raises(DataError, match="1 images are too few"):
        split(numbered(np.array([0])), section())
    bad = Source("s", ["a", "b"], numbered(np.array([0, 1, 2] * 9)).pools)
    with pytest.raises(DataError, match=r"labels 0\.\.1 in the split train, found 0\.\.2"):
        split(bad, section())


# Public sources


def test_digits_are_1797_with_fixed_splits() -> None:
    data, other = prepare(section(image_size=8)), prepare(section(image_size=8, split_seed=5, train_samples=100))
    assert {name: len(s) for name, s in data.splits.items()} == {"train": 1197, "val": 200, "test": 400}
    assert min(np.bincount(s.arrays["label"]).min() for s in data.splits.values()) >= 19
    images = np.concatenate([s.arrays["image"] for s in data.splits.values()])
    assert len(np.unique(images.reshape(1797, 64), axis=0)) == 1797
    image = data.splits["train"].arrays["image"]
    assert (image.dtype, image.shape[1:], image.max()) == (np.uint8, (8, 8, 1), 255)
    assert np.array_equal(data.splits["test"].arrays["image"], other.splits["test"].arrays["image"])
    assert data.info["mean"] == pytest.approx([image.mean() / 255])
    assert data.info["std"] == pytest.approx([image.std() / 255])
    assert (data.info["classes"][9], data.info["image_size"], data.info["channels"]) == ("9", [8, 8], 1)


def write_idx(folder: Path, compressed: bool = True) -> dict[str, bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    contents = {}
    for stem, count in (("train", 60), ("t10k", 20)):
        images, labels = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            data = head + array.tobytes()
            name = f"{stem}-{kind}-ubyte" + (".gz" if compressed else "")
            contents[name] = gzip.compress(data) if compressed else data
            (folder / name).write_bytes(contents[name])
    return contents


@pytest.mark.parametrize(("source", "folder"), [("mnist", "MNIST/raw"), ("fashion_mnist", "vision/fashion_mnist")])
def test_idx_files(tmp_path: Path, source: Any, folder: str) -> None:
    write_idx(tmp_path / folder, compressed=source == "fashion_mnist")
    data = prepare(DataSection(source=source, path=str(tmp_path), image_size=28))
    assert {name: len(s) for name, s in data.splits.items()} == {"train": 54, "val": 6, "test": 20}
    assert data.splits["test"].arrays["label"].tolist() == [k % 10 for k in range(20)]


def test_a_broken_idx_file_is_named(tmp_path: Path) -> None:
    contents = write_idx(tmp_path / "mnist")
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    for broken in (contents[path.name][:-20], b"no gzip", gzip.compress(b"\0\0\x0d\x03" + bytes(50))):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: expected an IDX file"):
            prepare(DataSection(source="mnist", path=str(tmp_path)))


def test_absent_data_says_what_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESTILL_DATA", str(tmp_path))
    monkeypatch.setattr(readers, "SYSTEM", tmp_path / "none")
    for source in ("mnist", "fashion_mnist", "cifar10"):
        with pytest.raises(DataError, match=rf"{source}: nothing under .*EDGESTILL_DATA.*data\.download=true to fetch"):
            prepare(DataSection(source=source))
    with pytest.raises(DataError, match=r"camvid: nothing under .*trainannot.*Cambridge-driving.*EDGESTILL_DATA"):
        prepare_masks(MaskSection(source="camvid"))


def test_without_any_setting_data_is_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGESTILL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_idx(tmp_path / "edgestill" / "vision" / "mnist")
    assert len(prepare(DataSection(source="mnist")).splits["test"]) == 20


def test_download_true_fetches_from_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = write_idx(tmp_path / "home")
    monkeypatch.setattr(readers, "SYSTEM", tmp_path / "none")
    with served(tmp_path / "home", [Path(name) for name in contents]) as files:
        monkeypatch.setitem(download.PUBLIC, "fashion_mnist", files)
        keys: dict[str, Any] = {"source": "fashion_mnist", "path": str(tmp_path / "data")}
        data = prepare(DataSection(**keys, download=True))
    assert len(data.splits["test"]) == 20
    assert sorted(p.name for p in (tmp_path / "data/vision/fashion_mnist").iterdir()) == sorted(contents)
    assert len(prepare(DataSection(**keys)).splits["test"]) == 20


def cifar_batch(count: int) -> tuple[bytes, np.ndarray]:
    images = RNG.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    return np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(count, -1)], 1).tobytes(), images


def test_cifar10_binary_packed_and_unpacked(tmp_path: Path) -> None:
    batches = {f"data_batch_{i}.bin": cifar_batch(20)[0] for i in range(1, 6)}
    batches["test_batch.bin"], truth = cifar_batch(20)
    packed, unpacked = tmp_path / "packed", tmp_path / "unpacked" / "cifar-10-batches-bin"
    packed.mkdir()
    unpacked.mkdir(parents=True)
    with tarfile.open(packed / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name, data in batches.items():
            (unpacked / name).write_bytes(data)
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    for root in (packed, tmp_path / "unpacked"):
        data = prepare(DataSection(source="cifar10", path=str(root)))
        assert {name: len(s) for name, s in data.splits.items()} == {"train": 90, "val": 10, "test": 20}
        assert np.array_equal(data.splits["test"].arrays["image"], truth)
        assert data.info["note"] is None
    (unpacked / "test_batch.bin").write_bytes(batches["test_batch.bin"][:-1])
    with pytest.raises(DataError, match="expected CIFAR-10's binary version"):
        prepare(DataSection(source="cifar10", path=str(tmp_path / "unpacked")))


def test_real_sources(data_root: Path) -> None:
    sizes = {"mnist": (17434, 10000), "fashion_mnist": (60000, 10000), "cifar10": (50000, 10000)}
    keys: dict[str, Any] = {"path": str(data_root)}
    for name, (train, test) in sizes.items():
        pools = readers.CLASSIFICATION[name](DataSection(source=name, **keys)).pools  # type: ignore[arg-type]
        assert (len(pools["train"]), len(pools["test"])) == (train, test)
        assert np.bincount(pools["test"].labels).min() > 800
    pools = readers.SEGMENTATION["camvid"](MaskSection(source="camvid", **keys)).pools
    assert [len(pools[name]) for name in ("train", "val", "test")] == [367, 101, 233]


def test_the_jpeg_copy_of_cifar10_says_so(data_root: Path) -> None:
    source = readers.cifar10(DataSection(source="cifar10", path=str(data_root)))
    if source.note is None:
        pytest.skip("the data folder has the original CIFAR-10")
    assert "not comparable" in source.note
    assert source.pools["test"].image(0).shape == (32, 32, 3)


def test_a_damaged_npz_is_named(tmp_path: Path) -> None:
    (tmp_path / "mnist_part.npz").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match=r"mnist_part\.npz: expected an \.npz with x_train"):
        prepare(DataSection(source="mnist", path=str(tmp_path)))
    np.savez(tmp_path / "cifar10_jpeg_train.npz", jpeg=np.zeros(9, np.uint8), offset=[0, 5], label=[0])
    with pytest.raises(DataError, match="arrays of one length"):
        prepare(DataSection(source="cifar10", path=str(tmp_path)))
    np.savez(tmp_path / "cifar10_jpeg_train.npz", jpeg=np.zeros(5, np.uint8), offset=[0, 5], label=[0])
    with pytest.raises(DataError, match=r"expected cifar10_jpeg_test\.npz"):
        prepare(DataSection(source="cifar10", path=str(tmp_path)))


# A folder of one's own


def test_a_folder_of_classes(tmp_path: Path) -> None:
    data = own(write_classes(tmp_path, {"cat": 20, "dog": 20}))
    assert data.info["classes"] == ["cat", "dog"]
    assert {name: len(s) for name, s in data.splits.items()} == {"train": 29, "val": 3, "test": 8}
    assert data.splits["train"].arrays["image"].shape == (29, 8, 8, 3)


def test_a_folder_of_splits_keeps_them(tmp_path: Path) -> None:
    for name, count in (("train", 6), ("valid", 2), ("test", 3)):
        write_classes(tmp_path / name, {"a": count, "b": count})
    (tmp_path / "train" / "a" / ".hidden").write_text("")
    (tmp_path / "README.md").write_text("")
    data = own(tmp_path)
    assert {name: len(s) for name, s in data.splits.items()} == {"train": 12, "val": 4, "test": 6}
    assert data.splits["test"].arrays["label"].tolist() == [0, 0, 0, 1, 1, 1]


def test_grey_stays_one_channel_unless_mixed(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 9, "b": 9}, grey=True)
    assert own(tmp_path).info["channels"] == 1
    write_image(tmp_path / "a" / "colour.png")
    data = own(tmp_path)
    assert (data.info["channels"], len(data.info["mean"])) == (3, 3)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert decode(tmp_path / "x.jpg", "x").shape == (6, 4, 3)


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found nothing"):
        own(tmp_path / "none")
    with pytest.raises(DataError, match="a folder per class, at least 2, found 0"):
        own(tmp_path)
    root = write_classes(tmp_path / "root", {"a": 9, "b": 9})
    (root / "c").mkdir()
    with pytest.raises(DataError, match=r"root/c: expected images, found none"):
        own(root)
    (root / "c" / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"notes\.txt: expected images"):
        own(root)
    (root / "c" / "notes.txt").unlink()
    (root / "c").rmdir()
    write_image(root / "train" / "a" / "0.png")
    with pytest.raises(DataError, match=r"root: beside its splits expected only .* found 'a'; rename or remove one"):
        own(root)


def test_a_class_only_in_a_later_split(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 9, "b": 9})
    write_classes(tmp_path / "test", {"a": 2, "z": 2})
    with pytest.raises(DataError, match=r"test/z: a class without training images"):
        own(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_a_corrupt_image_is_named(tmp_path: Path, damage: str) -> None:
    path = write_image(write_classes(tmp_path, {"a": 9, "b": 9}) / "a" / "bad.png", (64, 64))
    path.write_bytes({"empty": b"", "text": b"hello", "cut": path.read_bytes()[:2000]}[damage])
    with pytest.raises(DataError, match=r"bad\.png: expected an image.*replace it"):
        own(tmp_path)


def test_sixteen_bit_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png: expected 8 bits"):
        decode(tmp_path / "deep.png", str(tmp_path / "deep.png"))


# Masks of one's own


def write_masks(root: Path, count: int, size: tuple[int, int] = (10, 12), classes: int = 3) -> Path:
    for i in range(count):
        write_image(root / "images" / f"{i}.jpg", size)
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(RNG.integers(0, classes, size, dtype=np.uint8)).save(root / "masks" / f"{i}.png")
    return root


def own_masks(root: Path, **keys: Any) -> Any:
    return prepare_masks(
        MaskSection(source="folder", path=str(root), classes=("a", "b", "c"), image_size=(10, 12), **keys)
    )


def test_a_folder_of_masks(tmp_path: Path) -> None:
    data = own_masks(write_masks(tmp_path / "flat", 20))
    assert {name: len(s) for name, s in data.splits.items()} == {"train": 14, "val": 2, "test": 4}
    for name, count in (("train", 5), ("val", 2), ("test", 3)):
        write_masks(tmp_path / "split" / name, count)
    data = own_masks(tmp_path / "split")
    assert {name: len(s) for name, s in data.splits.items()} == {"train": 5, "val": 2, "test": 3}
    first = np.asarray(Image.open(tmp_path / "split" / "test" / "masks" / "0.png"))
    assert np.array_equal(data.splits["test"].arrays["label"][0], first)
    assert data.info["ignore_index"] == 255


def test_broken_masks_are_named(tmp_path: Path) -> None:
    root = write_masks(tmp_path, 9)
    path = root / "masks" / "0.png"
    Image.fromarray(np.full((10, 12), 7, np.uint8)).save(path)
    with pytest.raises(DataError, match=r"mask values 0\.\.2 or 255 .* found 7"):
        own_masks(root)
    assert own_masks(root, ignore_index=7).info["ignore_index"] == 7
    Image.fromarray(np.zeros((5, 12), np.uint8)).save(path)
    with pytest.raises(DataError, match=r"mask of the image's size \(10, 12\), found \(5, 12\)"):
        own_masks(root)
    Image.fromarray(np.zeros((10, 12, 3), np.uint8)).save(path)
    with pytest.raises(DataError, match=r"0\.png: expected a mask with a class number per pixel"):
        own_masks(root)
    path.unlink()
    with pytest.raises(DataError, match=r"0\.jpg: no mask .*0\.png"):
        own_masks(root)
    (root / "images" / "0.jpg").unlink()
    Image.fromarray(np.zeros((10, 12), np.uint8)).save(root / "masks" / "extra.png")
    with pytest.raises(DataError, match=r"extra\.png: no image"):
        own_masks(root)


def test_camvid_in_the_tutorial_layout(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        write_masks(tmp_path / name, 3, classes=12)
        (tmp_path / name / "images").rename(tmp_path / "images")
        (tmp_path / name / "masks").rename(tmp_path / f"{name}annot")
        (tmp_path / name).rmdir()
        (tmp_path / "images").rename(tmp_path / name)
    root = tmp_path.with_name("data")
    root.mkdir()
    tmp_path.rename(root / "camvid")
    data = prepare_masks(MaskSection(source="camvid", path=str(root), image_size=(10, 12)))
    assert {name: len(s) for name, s in data.splits.items()} == {"train": 3, "val": 3, "test": 3}
    assert (data.info["ignore_index"], len(data.info["classes"])) == (11, 11)
