"""Public data from its public homes: checksum-verified, resumable. Standard library only."""

from __future__ import annotations

import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.artifact import EdgestillError
from toolchain.artifact import sha256 as digest_of

_BLOCK = 1 << 18
_AGENT = {"User-Agent": "edgestill"}


class DownloadError(EdgestillError):
    """A file could not be had from its home."""


@dataclass(frozen=True)
class Remote:
    """A public file: where it is, what it must hash to, how long it is."""

    url: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def _idx(home: str, files: tuple[tuple[str, int, str], ...]) -> tuple[Remote, ...]:
    return tuple(Remote(f"{home}/{name}-ubyte.gz", sha256, size) for name, size, sha256 in files)


_TRACKS = (
    "https://raw.githubusercontent.com/abduallahmohamed/Social-STGCNN/333d3a57b4d2705e129b21aefefa09c79b2b9ae1/datasets"
)
_TRACK_FILES = {
    "biwi_eth.txt": (116970, "cf8d3fd342a15f409ebc2a1fc76b91a0f06390bd21f1e11410f3859331ab082b"),
    "biwi_eth_train.txt": (83681, "7905d1337f8466c3ebcd80e8264158209370e939774a371d215491256128407e"),
    "biwi_eth_val.txt": (44273, "ed19f8ee52e024788658d70060c1452b991aa506b78ea649c74f79e075ad20b9"),
    "biwi_hotel.txt": (143799, "9caa771bb9153d6b809dd0916b6f86761b641e6bbb15e766c1de3133fbbb7fcf"),
    "biwi_hotel_train.txt": (117490, "f3f485043273e3d972efd73770df0021ec7d3d5135f60d2e2ca5809f68d6f104"),
    "biwi_hotel_val.txt": (39395, "5c6026c5c6feb81295187e2e063d86197344428811ac2ae98a45bdfb5dfa79ed"),
    "crowds_zara01.txt": (205711, "1147a1962a09abfb86f28c6cddcac862e095a0cf129b3016385b69eacdd09d85"),
    "crowds_zara01_train.txt": (171116, "5b2ff1a334f4b3e8595e0ee898874b1795561db7bde97e90cbc4a1382c8c3d56"),
    "crowds_zara01_val.txt": (34595, "d5212e4e3289aa44365e5ce34a476ef2a4208c89bd6a29204ece097c7f33c157"),
    "crowds_zara02.txt": (392227, "8a649d0f8c9ae75c87c4d23a85f892786b0aa30266e996c7be03e69dafff22ff"),
    "crowds_zara02_train.txt": (306018, "9fd606341135d7d211c3af259c9eb2c25e4c7035efc43d3007ceeef6f954b247"),
    "crowds_zara02_val.txt": (86209, "361949e5655814680e1185bdd23344932f7b6ccc0d7120c34b523495d0fc69f8"),
    "crowds_zara03_train.txt": (146945, "d38a0a6cd1e24adadbb3b15cac97b747e5c6ace2c59d457d805f38a4d91d5a03"),
    "crowds_zara03_val.txt": (52889, "60d464e21fd3851fab146ec3b35d0db4155b3c057f4b46050336eac59314f0f5"),
    "students001.txt": (879714, "a6d87f278d94136fe39b8be91555487a29ac77259ae403b9dba2d5c18caf7b5b"),
    "students001_train.txt": (738442, "f41a0a63301e1c15104205c4a1540db477ddc3330ee2801a976d7b9fc238a63e"),
    "students001_val.txt": (141272, "dc8f3147820e80642903041b017292eb03ea5df81ffd2974b47a725d8ffeb394"),
    "students003.txt": (724279, "e25798b660634330aa89f8bb259425de720e84d0873902726c1d1f4ccff21d6c"),
    "students003_train.txt": (629898, "85fe6324e9a0b94acb21617eb0331f543fe5ebf0caee1e253794bca554f35daf"),
    "students003_val.txt": (94381, "b7aa6dcedba0e9036272dc363e2a25e6bb80d7485d75dcb3fff918ce01b10e24"),
    "uni_examples_train.txt": (89740, "06866bea5c2f589094473371e9fb6b653c7af95e5f748434bc1024544c5e1c7a"),
    "uni_examples_val.txt": (19567, "436dfa865ffab37957e928e227a1b6cc836ab0e6b7652abbf5d06cdf5638dee4"),
}
ETH_UCY = {  # scene -> the recordings held out for its test
    "eth": ("biwi_eth",),
    "hotel": ("biwi_hotel",),
    "univ": ("students001", "students003"),
    "zara1": ("crowds_zara01",),
    "zara2": ("crowds_zara02",),
}


def _eth_ucy(scene: str) -> tuple[Remote, ...]:
    """``<scene>/test`` holds whole recordings, ``train`` and ``val`` the parts of all others."""
    held_out = ETH_UCY[scene]
    others = sorted({name.rpartition("_")[0] for name in _TRACK_FILES if name.endswith("_val.txt")} - set(held_out))
    paths = [f"{part}/{name}_{part}.txt" for part in ("train", "val") for name in others]
    paths += [f"test/{name}.txt" for name in held_out]
    files = [(path, *_TRACK_FILES[path.rpartition("/")[2]]) for path in paths]
    return tuple(Remote(f"{_TRACKS}/{scene}/{path}", sha256, size) for path, size, sha256 in files)


PUBLIC: dict[str, tuple[Remote, ...]] = {
    "mnist": _idx(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        (
            ("train-images-idx3", 9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
            ("train-labels-idx1", 28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            ("t10k-images-idx3", 1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            ("t10k-labels-idx1", 4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        ),
    ),
    "fashion_mnist": _idx(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        (
            ("train-images-idx3", 26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
            ("train-labels-idx1", 29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            ("t10k-images-idx3", 4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            ("t10k-labels-idx1", 5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        ),
    ),
    "cifar10": (
        Remote(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            170052171,
        ),
    ),
    **{f"eth_ucy/{scene}": _eth_ucy(scene) for scene in ETH_UCY},
    "xquad": tuple(
        Remote(
            f"https://raw.githubusercontent.com/google-deepmind/xquad/7d30520c717524000f0d9d2f9c10a069acd9d285/xquad.{language}.json",
            sha256,
            size,
        )
        for language, size, sha256 in (
            ("ar", 1582988, "abdabd7afed5c635d99cca0f3f0d0c9d9ed0bc77451e963c2e4e0638c29e486d"),
            ("de", 669810, "990b5d746746ed65ed4702ea5f35f99ffa4e2f1c390c07d003642acd937916f9"),
            ("el", 1918889, "821cf0f88e73fa258fd2f548b19b6ec39f7025059e16f6f9fc8cd797c9c3663e"),
            ("en", 609383, "e4c57d1c9143aaa1c5d265ba5987a65f4e69528d2a98f29d6e75019b10344f29"),
            ("es", 684322, "dcbae93ec3a9f4b9e78fd834a171d6f96c1a875e10e15b7530b7e4ef4971e37e"),
            ("hi", 1680538, "df2cce3532b37e9beb8979704b5c9a4bf874358f105395a298b89427b43b9d24"),
            ("ro", 661158, "94f8d54e93ad2b7dd2e76dd921a666b5b8eff2d4379df9f179c42b445f09643f"),
            ("ru", 1896368, "208d5b1aa154c52b1b5c5eda16281e455e8fd198cdb9af3f469f0d6037d973bf"),
            ("th", 1809143, "5cdda11d0e1e075f7872abf4e6ae830388ce7f617964d542308e9ae4257e0f43"),
            ("tr", 729506, "92179a564774b7696100d144c1e10870d0a966b6fccbdd254a65b9d2ab1971cc"),
            ("vi", 911401, "f619a1eb11fb42d3ab0834259e488a65f585447ef6154437bfb7199d85161a04"),
            ("zh", 808652, "691d0b3359bc6b8faa8de931dfdfe21d50a65861ae348e32a0d1a0190b0c8835"),
        )
    ),
    "squad": (
        Remote(
            "https://rajpurkar.github.io/SQuAD-explorer/dataset/train-v1.1.json",
            "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
            30288272,
        ),
        Remote(
            "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v1.1.json",
            "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
            4854279,
        ),
    ),
    "tydiqa_goldp": (
        Remote(
            "https://storage.googleapis.com/tydiqa/v1.1/tydiqa-goldp-v1.1-train.json",
            "cefc8e09ff2548d9b10a678d3a6bbbe5bc036be543f92418819ea676c97be23b",
            58004076,
        ),
        Remote(
            "https://storage.googleapis.com/tydiqa/v1.1/tydiqa-goldp-v1.1-dev.json",
            "b286e0f34bc7f52259359989716f369b160565bd12ad8f3a3e311f9b0dbad1c0",
            5617409,
        ),
    ),
    "mlqa": (
        Remote(
            "https://dl.fbaipublicfiles.com/MLQA/MLQA_V1.zip",
            "246e8089933d13007fe80684d5c5c0713d6834cf8b3b4a0ec7c66f0a0d2baac8",
            75719050,
        ),
    ),
}


class _Retry(Exception):
    """This attempt failed in a way that another may not."""


def fetch(
    url: str,
    target: Path,
    sha256: str,
    size: int | None = None,
    *,
    opener: Callable[..., Any] = urllib.request.urlopen,
    attempts: int = 5,
    backoff_s: float = 1.0,
    timeout_s: float = 30.0,
) -> Path:
    """Download ``url`` to ``target`` and return it; nothing is at ``target`` unless its sha256 is right.

    What has arrived is kept in ``<target>.part`` and resumed, by this call and by later ones. ``opener`` is
    ``urllib.request.urlopen`` or the ``open`` of an ``OpenerDirector``. Raises DownloadError.
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, attempts + 1):
            resumed = part.exists() and part.stat().st_size > 0
            try:
                _receive(url, part, size, opener, timeout_s)
            except _Retry as error:
                if attempt == attempts:
                    raise DownloadError(
                        f"{url}: {error}, {attempts} times; check the network and run again: "
                        f"it goes on where it stopped. Or put the file at {target} yourself"
                    ) from error
                time.sleep(backoff_s * 2 ** (attempt - 1))
                continue
            found = digest_of(part)
            if found == sha256:
                part.replace(target)
                return target
            part.unlink()
            if not resumed or attempt == attempts:
                raise DownloadError(
                    f"{url}: expected sha256 {sha256[:12]}, found {found[:12]}: the server's file is another or was "
                    f"changed on the way; it was removed. Put the right file at {target} yourself"
                )
    except OSError as error:
        raise DownloadError(
            f"{target}: cannot be written ({error.strerror or error}); choose another data.path"
        ) from error
    raise AssertionError("unreachable")


def _receive(url: str, part: Path, size: int | None, opener: Callable[..., Any], timeout_s: float) -> None:
    """Bring ``part`` to its full length, or raise _Retry or DownloadError."""
    start = part.stat().st_size if part.exists() else 0
    if size is not None and start > size:
        part.unlink()
        start = 0
    if start and start == size:
        return
    request = urllib.request.Request(url, headers=_AGENT | ({"Range": f"bytes={start}-"} if start else {}))
    try:
        with opener(request, timeout=timeout_s) as response:
            if response.status != 206:
                start = 0
            elif not str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-"):
                part.unlink()
                raise _Retry(f"the server answered with the range {response.headers.get('Content-Range')}")
            length = response.headers.get("Content-Length")
            total = start + int(length) if length is not None else size
            _copy(response, part, start, total, url.rpartition("/")[2])
    except urllib.error.HTTPError as error:
        if error.code == 416:
            part.unlink(missing_ok=True)
        elif error.code != 429 and error.code < 500:
            raise DownloadError(
                f"{url}: the server says {error.code} {error.reason}; the file has moved: get it elsewhere and put it "
                f"at {part.with_name(part.name.removesuffix('.part'))}"
            ) from error
        raise _Retry(f"the server says {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError) as error:
        raise _Retry(f"no answer ({getattr(error, 'reason', None) or error or type(error).__name__})") from error
    received = part.stat().st_size
    if received < (size or total or 0):
        raise _Retry(f"expected {size or total} bytes, {received} arrived")


def _copy(response: Any, part: Path, start: int, total: int | None, name: str) -> None:
    from toolchain.stage import progress

    with part.open("ab" if start else "wb") as file, progress(f"downloading {name} (KiB)", (total or 0) // 1024) as bar:
        bar.advance(start // 1024)
        while block := response.read(_BLOCK):
            file.write(block)
            bar.advance(len(block) // 1024)
