"""The kernels' machine code: no local memory, and 16-byte loads in the main loops.

The limit of a loop is about a tenth above what it takes now. Rare branches count too.
"""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers import sass
from helpers.kernels import FILES

pytestmark = pytest.mark.skipif(sass.missing() is not None, reason=str(sass.missing()))

# For the loop that reads 16 bytes at a time: the number of loads, and the most instructions a byte.
MAIN_LOOPS = {
    "rows_kernel<float, TargetOutput<float> >": (4, 3.6),
    "rows_kernel<__nv_bfloat16, TargetOutput<float> >": (4, 6.9),
    "rows_kernel<float, TableOutput<float> >": (4, 3.6),
    "rows_kernel<__nv_bfloat16, TableOutput<float> >": (4, 6.9),
    "rows_kernel<float, DistanceOutput<float, float> >": (4, 3.6),
    "rows_kernel<float, StatisticsOutput<float> >": (4, 9.5),
    "rows_kernel<__nv_bfloat16, StatisticsOutput<float> >": (4, 17),
    "tile_kernel<float, TargetOutput<float> >": (4, 1),
    "tile_kernel<__nv_bfloat16, TargetOutput<float> >": (4, 1),
    "tile_kernel<__nv_bfloat16, StatisticsOutput<float> >": (4, 1),
    "gradient_kernel<float, true>": (2, 8.3),
    "gradient_kernel<__nv_bfloat16, true>": (2, 15.5),
    "moment_norm_kernel<float, 4>": (2, 1.7),
    "moment_piece_kernel<float, 4, (RowNorm)0>": (8, 6.6),
    "moment_piece_kernel<__nv_bfloat16, 8, (RowNorm)0>": (4, 10.5),
}


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, sass.Kernel]:
    """All kernels by their names."""
    folder = tmp_path_factory.mktemp("sass")
    with ThreadPoolExecutor(2) as pool:
        files = pool.map(lambda file: sass.compiled(file, folder), FILES)
        return {kernel.name: kernel for file in files for kernel in file}


def test_nothing_is_in_local_memory(kernels: dict[str, sass.Kernel]) -> None:
    assert len(kernels) > 100
    local = re.compile("LDL|STL")
    assert [k.name for k in kernels.values() if any(map(local.match, k.opcodes))] == []


@pytest.mark.parametrize("name", MAIN_LOOPS)
def test_main_loop(kernels: dict[str, sass.Kernel], name: str) -> None:
    loads, most = MAIN_LOOPS[name]
    loops = [loop for loop in kernels[name].loops if loop.loads(16) == loads]
    assert loops, [(loop.loads(16), loop.bytes_read) for loop in kernels[name].loops]
    assert min(len(loop.opcodes) / loop.bytes_read for loop in loops) <= most
