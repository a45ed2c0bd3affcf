"""csrc/bindings.cpp: kernels on addresses. What an argument means is said there and in the headers it includes."""

cuda_architectures: str
"""Those that the CUDA kernels were compiled for, such as "80,90"; empty without CUDA."""

def instruction_set() -> str: ...

# A problem is two tuples of numbers, which fastkd/native/logit.py lays out: where the logits are, and all the rest.
def logit_forward(
    logits: tuple[int, ...], numbers: tuple[float, ...], reduction: int, divisor: float, loss: int, state: int, /
) -> tuple[int, float]: ...
def logit_backward(
    logits: tuple[int, ...],
    numbers: tuple[float, ...],
    state: int,
    grad_loss: int,
    grad_loss_stride: int,
    scale: float,
    grad: int,
    stride: int,
    fresh: bool,
    /,
) -> None: ...

# The same two tuples, and where the ids are and how many a row.
def topk_gather(
    logits: tuple[int, ...],
    numbers: tuple[float, ...],
    ids: int,
    count: int,
    best: int,
    state: int,
    events: int,
    /,
) -> tuple[int, int, float]: ...
def topk_scatter(
    logits: tuple[int, ...],
    numbers: tuple[float, ...],
    ids: int,
    count: int,
    state: int,
    events: int,
    slopes: int,
    grad_loss: int,
    grad_loss_stride: int,
    scale: float,
    grad: int,
    stride: int,
    fresh: bool,
    /,
) -> None: ...

# A problem of attention is one tuple, which fastkd/native/attention.py lays out; a gradient's memory is another.
def attention_forward(
    numbers: tuple[float, ...], reduction: int, divisor: float, loss: int, state: int, /
) -> float: ...
def attention_backward(
    numbers: tuple[float, ...],
    state: int,
    grad_loss: int,
    by_row: bool,
    scale: float,
    of_queries: tuple[int, ...],
    of_keys: tuple[int, ...],
    same: bool,
    /,
) -> None: ...

# The factors are csrc/cpu/matmul.h's; `out` is floats, or doubles where it says wide.
def matmul(
    left: int,
    left_doubles: bool,
    left_across: int,
    left_along: int,
    right: int,
    right_doubles: bool,
    right_across: int,
    right_along: int,
    rows: int,
    depth: int,
    columns: int,
    adds: bool,
    threads: int,
    out: int,
    /,
) -> None: ...
def matmul_wide(
    left: int,
    left_doubles: bool,
    left_across: int,
    left_along: int,
    right: int,
    right_doubles: bool,
    right_across: int,
    right_along: int,
    rows: int,
    depth: int,
    columns: int,
    adds: bool,
    threads: int,
    out: int,
    /,
) -> None: ...

# Cosines and slopes are contiguous doubles. No slopes: 0.
def compare_similarities(
    student: int, teacher: int, rows: int, columns: int, eps: float, threads: int, slopes: int, /
) -> float: ...

# Addresses of contiguous doubles, or of floats where it says narrow; squares are doubles. y is 0 for the rows of x.
def pair_squares(x: int, n: int, y: int, m: int, width: int, threads: int, out: int, /) -> None: ...
def pair_squares_narrow(x: int, n: int, y: int, m: int, width: int, threads: int, out: int, /) -> None: ...
def pair_pull(w: int, x: int, n: int, y: int, m: int, width: int, threads: int, out: int, /) -> None: ...
def pair_pull_narrow(w: int, x: int, n: int, y: int, m: int, width: int, threads: int, out: int, /) -> None: ...
def pair_distance_loss(student: int, teacher: int, n: int, delta: float, threads: int, slopes: int, /) -> float: ...
def pair_angle_loss(student: int, teacher: int, n: int, delta: float, threads: int, slopes: int, /) -> float: ...

# Addresses of whole tensors; a gradient at 0 is not wanted, nor is a mask there.
def hint_loss(
    student: int,
    student_dtype: int,
    teacher: int,
    teacher_dtype: int,
    rows: int,
    width: int,
    mask: int,
    distance: int,
    delta: float,
    scale: float,
    threads: int,
    gradient: int,
    /,
) -> float: ...
def attention_maps(
    features: int,
    dtype: int,
    samples: int,
    channels: int,
    positions: int,
    channels_last: bool,
    p: float,
    threads: int,
    maps: int,
    /,
) -> None: ...
def attention_map_loss(
    features: int,
    dtype: int,
    samples: int,
    channels: int,
    positions: int,
    channels_last: bool,
    p: float,
    threads: int,
    teacher: int,
    paper: bool,
    scale: float,
    gradient: int,
    /,
) -> float: ...

# Only where the extension was built with CUDA.
def cuda_device_count() -> int: ...

# csrc/cuda/pairs.h. Last comes the stream. (squares of the student, of the teacher, their sums) and (rows, squares of
# their lengths, how many) are tuples.
def cuda_squared_distances(
    products: int, x: tuple[int, int, int], y: tuple[int, int, int], d: int, own: bool, squares: int, stream: int, /
) -> None: ...
def cuda_pull(weights: int, x: int, n: int, y: int, m: int, d: int, out: int, stream: int, /) -> None: ...
def cuda_distance_loss_scratch(n: int, /) -> int: ...
def cuda_distance_loss(
    squares: tuple[int, ...],
    n: int,
    coincident: float,
    delta: float,
    loss: int,
    slopes: int,
    scratch: int,
    stream: int,
    /,
) -> None: ...
def cuda_angle_loss_scratch(n: int, gradient: bool, slab_bytes: int, /) -> int: ...
def cuda_angle_loss(
    squares: tuple[int, ...],
    n: int,
    coincident: float,
    delta: float,
    loss: int,
    slopes: int,
    slab_bytes: int,
    scratch: int,
    stream: int,
    /,
) -> None: ...

# int8 layers. Their shape: output channels, a group's input channels, taps, groups, taps of a line;
# fastkd/native/int8_call.py lays out the rest. False: the input's scale is not a positive number, nothing was computed.
def int8_packed_bytes(shape: tuple[int, int, int, int, int], /) -> int: ...
def int8_pack(shape: tuple[int, int, int, int, int], weight: int, packed: int, threads: int, /) -> None: ...
def int8_linear(shape: tuple[int, int, int, int, int], numbers: tuple[int, ...], /) -> bool: ...
def int8_conv2d(shape: tuple[int, int, int, int, int], numbers: tuple[int, ...], /) -> bool: ...

# csrc/cpu/int8_winograd.h: whether it is worth it for these images (the numbers that follow those of a layer), what its
# weights take, and whether they allow it.
def int8_winograd_pays(shape: tuple[int, int, int, int, int], images: tuple[int, ...], threads: int, /) -> bool: ...
def int8_winograd_bytes(shape: tuple[int, int, int, int, int], /) -> int: ...
def int8_winograd_pack(shape: tuple[int, int, int, int, int], weight: int, packed: int, threads: int, /) -> bool: ...
def int8_winograd(shape: tuple[int, int, int, int, int], numbers: tuple[int, ...], /) -> bool: ...
def int8_weight_only(shape: tuple[int, int, int, int, int], numbers: tuple[int, ...], /) -> bool: ...

# Where the first id is that is no row of the table; the number of ids, if there is none.
def int8_embedding(
    weight: int, scale: int, rows: int, columns: int, ids: int, count: int, output: int, dtype: int, threads: int, /
) -> int: ...

# How many products the threads made of what registers hold, `rounds` times each: the roof that the benches measure.
def int8_peak(rounds: int, threads: int, /) -> int: ...

# csrc/cuda/int8.h. `numbers` are laid out by fastkd/native/_int8_cuda.py.
def cuda_int8_linear_scratch(rows: int, terms: int, columns: int, processors: int, /) -> int: ...
def cuda_int8_linear(numbers: tuple[int, ...], processors: int, scratch: int, stream: int, /) -> None: ...
