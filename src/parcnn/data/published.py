"""What is known of each published data set: its files, sizes, check sums, classes, and where they can be had.

The SHA-256 sums are those of the files as published: several projects that download them (TensorFlow Datasets among
them) give the same ones, beside the MD5 sums that the publishers give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RemoteFile:
    """A file as published: `size` in bytes, `sha256` in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Published:
    """A published data set.

    Attributes:
        name: what the user calls it.
        layout: 'idx' or 'cifar'.
        folders: where below a data folder its files are looked for, in order.
        files: for each split the names of its files; IDX: images, then labels.
        counts: how many images each split has.
        shape: (C, H, W) of an image.
        classes: the name of each class.
        downloads: the files to download; for CIFAR one archive that holds the files under `folders[0]`.
        mirrors: addresses under which all of `downloads` are found, tried in turn.
        label_bytes: CIFAR: bytes of label in a record.
        first_labels: IDX: the first labels of each split, which tell two sets of the same file names apart.
    """

    name: str
    layout: str
    folders: tuple[str, ...]
    files: Mapping[str, tuple[str, ...]]
    counts: Mapping[str, int]
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    downloads: tuple[RemoteFile, ...]
    mirrors: tuple[str, ...]
    label_bytes: int = 1
    first_labels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}

MNIST = Published(
    name="mnist",
    layout="idx",
    folders=("mnist", "MNIST/raw", "."),
    files=IDX_FILES,
    counts={"train": 60_000, "test": 10_000},
    shape=(1, 28, 28),
    classes=tuple("0123456789"),
    downloads=(
        RemoteFile(
            "train-images-idx3-ubyte.gz", 9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
        ),
        RemoteFile(
            "train-labels-idx1-ubyte.gz", 28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
        ),
        RemoteFile(
            "t10k-images-idx3-ubyte.gz", 1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
        ),
        RemoteFile(
            "t10k-labels-idx1-ubyte.gz", 4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
        ),
    ),
    mirrors=("https://storage.googleapis.com/cvdf-datasets/mnist/", "https://ossci-datasets.s3.amazonaws.com/mnist/"),
    first_labels={"train": (5, 0, 4, 1, 9, 2, 1, 3, 1, 4), "test": (7, 2, 1, 0, 4, 1, 4, 9, 5, 9)},
)

FASHION_MNIST = Published(
    name="fashion-mnist",
    layout="idx",
    folders=("fashion-mnist", "FashionMNIST/raw", "."),
    files=IDX_FILES,
    counts={"train": 60_000, "test": 10_000},
    shape=(1, 28, 28),
    classes=(
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    downloads=(
        RemoteFile(
            "train-images-idx3-ubyte.gz", 26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
        ),
        RemoteFile(
            "train-labels-idx1-ubyte.gz", 29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
        ),
        RemoteFile(
            "t10k-images-idx3-ubyte.gz", 4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
        ),
        RemoteFile(
            "t10k-labels-idx1-ubyte.gz", 5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
        ),
    ),
    mirrors=(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    first_labels={"train": (9, 0, 0, 3, 0, 2, 7, 2, 5, 5), "test": (9, 2, 1, 1, 6, 1, 4, 6, 5, 7)},
)  # fmt: skip

CIFAR10 = Published(
    name="cifar10",
    layout="cifar",
    folders=("cifar-10-batches-bin", "cifar10/cifar-10-batches-bin", "cifar10", "."),
    files={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
    counts={"train": 50_000, "test": 10_000},
    shape=(3, 32, 32),
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    downloads=(
        RemoteFile(
            "cifar-10-binary.tar.gz", 170_052_171, "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
        ),
    ),
    mirrors=("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/"),
)

CIFAR100 = Published(
    name="cifar100",
    layout="cifar",
    folders=("cifar-100-binary", "cifar100/cifar-100-binary", "cifar100", "."),
    files={"train": ("train.bin",), "test": ("test.bin",)},
    counts={"train": 50_000, "test": 10_000},
    shape=(3, 32, 32),
    classes=(
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
        "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
        "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
        "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
        "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
        "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
        "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
        "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
        "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
        "willow_tree", "wolf", "woman", "worm",
    ),
    downloads=(
        RemoteFile(
            "cifar-100-binary.tar.gz", 168_513_733, "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
        ),
    ),
    mirrors=("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/"),
    label_bytes=2,
)  # fmt: skip

PUBLISHED = {published.name: published for published in (MNIST, FASHION_MNIST, CIFAR10, CIFAR100)}
