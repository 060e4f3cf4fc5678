"""Where Fashion-MNIST is: in the folder of a package, in the cache, or on a server."""

from pathlib import Path

from .download import RemoteFile, Source, fetch

PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# The addresses and sizes are those of the data set's authors, who publish MD5 checksums. Files with
# these MD5 checksums have these SHA-256 checksums.
SOURCE = Source(
    name="fashion-mnist",
    address="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    files=(
        RemoteFile(
            "train-images-idx3-ubyte.gz",
            26_421_880,
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        RemoteFile(
            "train-labels-idx1-ubyte.gz",
            29_515,
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        RemoteFile(
            "t10k-images-idx3-ubyte.gz",
            4_422_102,
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        RemoteFile(
            "t10k-labels-idx1-ubyte.gz",
            5_148,
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    otherwise=(
        "install the Debian package dataset-fashion-mnist, or copy the four files from another "
        "machine and pass their folder with --data-dir"
    ),
)


def find_folder(*, quiet: bool) -> Path:
    """The folder of the Debian package if it holds the files, or else that of the cache.

    Files that the cache lacks are downloaded.

    Raises:
        DataError: A file cannot be downloaded or stored.
    """
    names = [PACKAGE_FOLDER / file.name for file in SOURCE.files]
    if all(path.exists() or path.with_suffix("").exists() for path in names):
        return PACKAGE_FOLDER
    return fetch(SOURCE, quiet=quiet)
