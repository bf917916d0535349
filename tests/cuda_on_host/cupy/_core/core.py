"""What CuPy adds to the options of a compilation."""


def assemble_cupy_compiler_options(options: tuple[str, ...]) -> tuple[str, ...]:
    """The options; CuPy adds the folders of CUDA's headers to them."""
    return tuple(options)
