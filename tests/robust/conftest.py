"""What these tests share: mutated files."""

import random


def mutate(content, rng):
    """Change one bit, or cut out, double, zero or replace a piece, or cut the end."""
    start = rng.randrange(len(content))
    size = rng.choice((1, 2, 8, 60, 1000))
    head, piece, tail = content[:start], content[start:][:size], content[start + size :]
    bit = bytes([piece[0] ^ 1 << rng.randrange(8)])
    middle = [bit + piece[1:], b"", piece * 2, bytes(len(piece)), rng.randbytes(size)]
    return rng.choice([*[head + new + tail for new in middle], head])


def mutations(path, n):
    """Mutate a file n times, each time from what it was at first."""
    content = path.read_bytes()
    for seed in range(n):
        path.write_bytes(mutate(content, random.Random(seed)))
        yield
