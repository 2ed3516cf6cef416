"""The sources of images by name; each function gives a ``datasets.Source`` or raises DataError."""

from __future__ import annotations

import gzip
import struct
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.download import PUBLIC, fetch
from toolchain.tasks.datasets import (
    SUFFIXES,
    DataError,
    Images,
    Labels,
    Pool,
    Source,
    data_root,
    decode,
    draw,
    find,
    to_array,
)

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CAMVID = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
)
CAMVID_VOID = 11
SYSTEM = Path("/usr/share/datasets")  # of the Debian package dataset-fashion-mnist
IDX = tuple(f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))


def digits(section: Any) -> Source:
    """1,797 scanned digits (UCI, in scikit-learn's wheel), 8x8 grey; always the same 1,197, 200 and 400 of them."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "source digits ships with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    loaded = load_digits()
    rest = _arrays(np.rint(loaded.images * (255 / 16)).astype(np.uint8), loaded.target)
    pools = {}
    for stream, (name, count) in enumerate({"test": 400, "val": 200}.items()):
        drawn = draw(rest.labels, count, [0, stream])
        pools[name] = rest.select(drawn)
        rest = rest.select(np.setdiff1d(np.arange(len(rest)), drawn))
    return Source("digits", DIGITS, {"train": rest, **pools})


def mnist(section: Any) -> Source:
    """MNIST as IDX files, or ``mnist_part.npz``: 17,434 of its training images and the whole test set."""
    root = data_root(section.path)
    part = None if _idx_folder(root, "mnist") else find(root, "mnist_part.npz")
    if part is None:
        return _idx_source(section, "mnist", DIGITS)
    arrays = _npz(part, "x_train", "y_train", "x_test", "y_test")
    pools = {name: _arrays(arrays[f"x_{name}"], arrays[f"y_{name}"]) for name in ("train", "test")}
    note = (
        f"{len(pools['train']):,} of MNIST's 60,000 training images: accuracies compare only with runs on the same part"
    )
    return Source("mnist", DIGITS, pools, note=note)


def fashion_mnist(section: Any) -> Source:
    """Fashion-MNIST as IDX files."""
    return _idx_source(section, "fashion_mnist", FASHION)


def cifar10(section: Any) -> Source:
    """CIFAR-10's binary version (tar.gz, or unpacked), or its JPEG copy ``cifar10_jpeg_{train,test}.npz``."""
    root = data_root(section.path)
    original = find(root, "cifar-10-batches-bin", "cifar-10-binary.tar.gz", "cifar10/cifar-10-binary.tar.gz")
    if original is None and find(root, "cifar10_jpeg_train.npz"):
        note = "JPEG copy of CIFAR-10 (mean PSNR 30.6 dB): accuracies are not comparable with published CIFAR-10 ones"
        pools = {name: _jpegs(root, f"cifar10_jpeg_{name}.npz")[0] for name in ("train", "test")}
        return Source("cifar10", CIFAR, pools, note=note)
    if original is None:
        remote = PUBLIC["cifar10"][0]
        accepted = "cifar-10-binary.tar.gz, cifar-10-batches-bin/ or cifar10_jpeg_{train,test}.npz"
        original = _download("cifar10", root, accepted, section.download) / remote.name
    names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    pools = {"train": _cifar_batches(original, names), "test": _cifar_batches(original, ["test_batch.bin"])}
    return Source("cifar10", CIFAR, pools)


def camvid(section: Any) -> Source:
    """CamVid, 11 classes: ``camvid_240x180_{train,val,test}.npz``, or ``camvid/`` with train, trainannot, val, ..."""
    root = data_root(section.path)
    names = ("train", "val", "test")
    if find(root, "camvid_240x180_train.npz"):
        pools = {}
        for name in names:
            pool, arrays = _jpegs(root, f"camvid_240x180_{name}.npz", "mask")
            masks = arrays["mask"]
            pools[name] = Pool(pool.labels, pool.image, masks.__getitem__)
        return Source("camvid", CAMVID, pools, CAMVID_VOID)
    folder = find(root, "camvid", "CamVid")
    if folder is None:
        raise DataError(
            f"camvid: nothing under {root}: expected vision/camvid_240x180_{{train,val,test}}.npz, or vision/camvid/ "
            "with the folders train, trainannot, val, valannot, test, testannot of PNGs (masks 0..10, void 11), as in "
            "the SegNet tutorial's copy. edgestill cannot download it: get it from the page of the Cambridge-driving "
            "Labeled Video Database at the University of Cambridge, and set EDGESTILL_DATA or data.path"
        )
    return Source("camvid", CAMVID, {n: _pairs(folder / n, folder / f"{n}annot") for n in names}, CAMVID_VOID)


def image_folder(section: Any) -> Source:
    """``root/<split>/<class>/*`` or ``root/<class>/*``."""
    root = _own_root(section)
    layout = _layout(root)
    listed = {name: {sub.name: _image_files(sub) for sub in _folders(folder)} for name, folder in layout.items()}
    classes = sorted(listed["train"])
    if len(classes) < 2:
        raise DataError(
            f"{layout['train']}: expected a folder per class, at least 2, found {len(classes)}; "
            "arrange the images as <split>/<class>/* or <class>/*"
        )
    pools = {}
    for name, of_class in listed.items():
        if unknown := sorted(set(of_class) - set(classes)):
            raise DataError(
                f"{layout[name] / unknown[0]}: a class without training images; add some, or remove the folder"
            )
        files = [file for c in classes for file in of_class.get(c, [])]
        labels = [k for k, c in enumerate(classes) for _ in of_class.get(c, [])]
        pools[name] = _files(files, labels)
    return Source(str(root), classes, pools)


def mask_folder(section: Any) -> Source:
    """``root/<split>/images/*`` with ``root/<split>/masks/*.png``, or without the split level."""
    root = _own_root(section)
    layout = {"train": root} if (root / "images").is_dir() else _layout(root)
    pools = {name: _pairs(folder / "images", folder / "masks") for name, folder in layout.items()}
    return Source(str(root), section.classes, pools, 255 if section.ignore_index is None else section.ignore_index)


def huggingface(section: Any) -> Source:
    """A Hugging Face dataset by hub name or local folder; its labels are class names, integers or texts."""
    name = section.dataset
    if not section.download and not Path(name).is_dir():
        raise DataError(
            f"dataset {name!r}: expected a local folder, found none; set data.download=true to fetch it from the hub "
            "(what is in the hub's cache is not fetched again)"
        )
    try:
        import datasets
    except ImportError as error:
        raise DataError("source huggingface needs the package datasets: pip install datasets") from error
    try:
        loaded = datasets.load_dataset(name, section.dataset_config, revision=section.revision)
    except Exception as error:  # its errors have no common base
        raise DataError(
            f"dataset {name!r}: cannot be loaded ({type(error).__name__}: {error}); "
            "check data.dataset, data.dataset_config, data.revision and the network"
        ) from error
    remedy = "put the splits that you want into a local folder, and name it as data.dataset"
    found = {ours: loaded[theirs] for ours, theirs in _by_split(loaded, f"dataset {name!r}", remedy).items()}
    if "train" not in found:
        raise DataError(
            f"dataset {name!r}: expected a split called train, found {sorted(loaded)}; choose another dataset"
        )
    image, label = section.image_column, section.label_column
    for key, rows in found.items():
        if missing := [column for column in (image, label) if column not in rows.column_names]:
            raise DataError(
                f"dataset {name!r}, split {key}: no column {missing[0]!r}, found {rows.column_names}; "
                "set data.image_column and data.label_column"
            )
    classes = getattr(found["train"].features[label], "names", None)
    values = {key: list(rows[label]) for key, rows in found.items()}
    known = list(range(len(classes))) if classes else sorted(set(values["train"]) - {None})
    place = {value: k for k, value in enumerate(known)}
    pools = {}
    for key, rows in found.items():
        if beyond := sorted({str(value) for value in values[key] if value not in place}):
            raise DataError(
                f"dataset {name!r}, split {key}: expected labels among the {len(known)} of the training split, found "
                f"{beyond[0]}; choose a dataset whose splits are all labelled alike"
            )
        pools[key] = Pool(_labels([place[value] for value in values[key]]), _hub_image(rows, image, f"{name} {key}"))
    return Source(name, classes or [str(value) for value in known], pools)


def _hub_image(rows: Any, column: str, name: str) -> Callable[[int], Images]:
    def image(i: int) -> Images:
        try:
            value = rows[i][column]
        except Exception as error:  # a decoder may raise anything on a damaged file
            raise DataError(f"{name} {i}: the image cannot be decoded ({error}); replace or remove that row") from error
        if not hasattr(value, "convert"):
            raise DataError(
                f"{name} {i}: expected an image in {column!r}, found {type(value).__name__}; set data.image_column"
            )
        return to_array(value, f"{name} {i}")

    return image


def _labels(values: Any) -> Labels:
    return np.asarray(values, dtype=np.int64)


def _arrays(images: Images, labels: Any) -> Pool:
    return Pool(_labels(labels), images.__getitem__)


def _files(files: Sequence[Path], labels: Sequence[int]) -> Pool:
    return Pool(_labels(labels), lambda i: decode(files[i], str(files[i])))


def _own_root(section: Any) -> Path:
    root = Path(section.path).expanduser()
    if not root.is_dir():
        raise DataError(
            f"data.path {root}: expected a folder of images, found {'a file' if root.exists() else 'nothing'}"
        )
    return root


def _layout(root: Path) -> dict[str, Path]:
    """Split -> folder; without split folders the whole is ``train``."""
    names = [folder.name for folder in _folders(root)]
    if not set(names) & set(SPLITS):
        return {"train": root}
    known = _by_split(names, str(root), "rename or remove one")
    if "train" not in known:
        raise DataError(f"{root}: expected a folder train beside {names}; add it")
    return {ours: root / theirs for ours, theirs in known.items()}


def _by_split(names: Iterable[str], where: str, remedy: str) -> dict[str, str]:
    """Our name of each split and its own. Raises DataError for a name that is no split's, and for two of one split."""
    found: dict[str, str] = {}
    for name in names:
        if name not in SPLITS:
            raise DataError(f"{where}: beside its splits expected only train, val and test, found {name!r}; {remedy}")
        if first := found.get(SPLITS[name]):
            raise DataError(f"{where}: expected one split {SPLITS[name]}, found {first!r} and {name!r}; {remedy}")
        found[SPLITS[name]] = name
    return found


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(
            f"{folder}: expected a folder of images, found {'a file' if folder.exists() else 'nothing'}; add it"
        )
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in files:
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: expected images ({', '.join(SUFFIXES)}); convert it, or move it elsewhere")
    if not files:
        raise DataError(f"{folder}: expected images, found none; add some, or remove the folder")
    return files


def _pairs(images: Path, masks: Path) -> Pool:
    """Images and masks of equal stem."""
    files, found = _image_files(images), _image_files(masks)
    of_stem = {path.stem: path for path in found}
    if len(of_stem) < len(found):
        raise DataError(f"{masks}: expected one mask per image, found two of one name; remove one")
    for file in files:
        if file.stem not in of_stem:
            raise DataError(f"{file}: no mask {masks / file.stem}.png; add it, or remove the image")
    if extra := sorted(set(of_stem) - {file.stem for file in files}):
        raise DataError(f"{of_stem[extra[0]]}: no image {images / extra[0]}; add it, or remove the mask")
    pool = _files(files, [0] * len(files))
    return Pool(
        pool.labels, pool.image, lambda i: decode(of_stem[files[i].stem], str(of_stem[files[i].stem]), mask=True)
    )


def _npz(path: Path, *names: str) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as loaded:
            return {name: loaded[name] for name in names}
    except Exception as error:  # zip, zlib, struct and numpy each raise their own
        raise DataError(
            f"{path}: expected an .npz with {', '.join(names)} ({type(error).__name__}: {error}); copy it again"
        ) from error


def _jpegs(root: Path, file: str, *more: str) -> tuple[Pool, dict[str, Any]]:
    """An .npz of JPEGs back to back: ``jpeg`` bytes, ``offset`` (n + 1,), and ``label`` (n,) or the arrays ``more``."""
    path = find(root, file)
    if path is None:
        raise DataError(f"{root}: expected {file} beside the other splits, found nothing; copy it there")
    arrays = _npz(path, "jpeg", "offset", *(more or ("label",)))
    jpeg, offset = arrays["jpeg"], arrays["offset"]
    labels = arrays.get("label", np.zeros(max(len(offset) - 1, 0)))
    if (
        len(offset) < 2
        or offset[-1] != len(jpeg)
        or any(len(arrays.get(name, labels)) != len(labels) for name in ("label", *more))
    ):
        raise DataError(
            f"{path}: expected arrays of one length, found {[len(array) for array in arrays.values()]}; copy it again"
        )
    return Pool(_labels(labels), lambda i: decode(jpeg[offset[i] : offset[i + 1]].tobytes(), f"{path} {i}")), arrays


def _idx_folder(root: Path, name: str) -> Path | None:
    """The folder under ``root``, or of the system's package, that holds all four IDX files, gzipped or not."""
    dashed = name.replace("_", "-")
    plain = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw"}[name]
    candidates = [base / sub for sub in (name, dashed, plain) for base in (root / "vision", root)]
    for folder in [*candidates, SYSTEM / dashed]:
        if all((folder / f"{stem}.gz").is_file() or (folder / stem).is_file() for stem in IDX):
            return folder
    return None


def _idx_source(section: Any, name: str, classes: Sequence[str]) -> Source:
    root = data_root(section.path)
    accepted = f"{name}/ with {', '.join(IDX)} (plain or .gz)"
    folder = _idx_folder(root, name) or _download(name, root, accepted, section.download)
    pools = {}
    for split_name, stem in (("train", "train"), ("test", "t10k")):
        images = _idx(folder, f"{stem}-images-idx3-ubyte", 3)
        labels = _idx(folder, f"{stem}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise DataError(f"{folder}: {stem}: {len(images)} images but {len(labels)} labels; copy both files again")
        pools[split_name] = _arrays(images, labels)
    return Source(name, classes, pools)


def _idx(folder: Path, stem: str, dimensions: int) -> Images:
    path = folder / f"{stem}.gz" if (folder / f"{stem}.gz").is_file() else folder / stem
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        header = 4 + 4 * dimensions
        if data[:4] != bytes((0, 0, 8, dimensions)):
            raise ValueError(f"it begins with {data[:4].hex()}")
        shape = struct.unpack(f">{dimensions}I", data[4:header])
        return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
    except Exception as error:  # gzip, zlib, struct and numpy each raise their own
        raise DataError(
            f"{path}: expected an IDX file of uint8 ({type(error).__name__}: {error}); get it again"
        ) from error


def _cifar_batches(source: Path, names: Sequence[str]) -> Pool:
    """Records of a label byte and 3x32x32 pixels, from the folder or the tar.gz."""
    try:
        if source.is_dir():
            blobs = [(source / name).read_bytes() for name in names]
        else:
            with tarfile.open(source) as tar:
                members = [tar.extractfile(f"cifar-10-batches-bin/{name}") for name in names]
                blobs = [member.read() for member in members if member is not None]
        records = np.frombuffer(b"".join(blobs), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    except Exception as error:  # tar, gzip, zlib and numpy each raise their own
        raise DataError(
            f"{source}: expected CIFAR-10's binary version ({type(error).__name__}: {error}); get it again"
        ) from error
    return _arrays(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0])


def _download(name: str, root: Path, accepted: str, allowed: bool) -> Path:
    """Fetch a public source into ``root/vision/<name>``, if ``allowed``."""
    remotes = PUBLIC[name]
    if not allowed:
        home, _, _ = remotes[0].url.rpartition("/")
        raise DataError(
            f"{name}: nothing under {root}: expected vision/{accepted}. Set EDGESTILL_DATA (or data.path) to a folder "
            f"that has it, or data.download=true to fetch {sum(r.size for r in remotes) / 1e6:.0f} MB from {home}"
        )
    for remote in remotes:
        target = root / "vision" / name / remote.name
        if not target.exists():
            fetch(remote.url, target, remote.sha256, remote.size)
    return root / "vision" / name


CLASSIFICATION: dict[str, Callable[[Any], Source]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "folder": image_folder,
    "huggingface": huggingface,
}
SEGMENTATION: dict[str, Callable[[Any], Source]] = {"camvid": camvid, "folder": mask_folder}
