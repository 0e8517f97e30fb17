"""Named arrays <-> safetensors bytes, with limits that are checked before anything is allocated.

A file is 8 bytes (the header's length, little-endian), a JSON header and the tensors' data back to back. We read the
header with a parser of our own, because a body comes from another organization: every field is checked, and none is
believed before it is. No format here contains a class name, so reading a file runs no code.

    errors    the refusals, each with its problem code
    header    the header: parse, check against a manifest, write; no NumPy, so the agent's own process may use it
    dtypes    element types as NumPy's
    arrays    whole files as dictionaries of arrays
    scanner   a body in flight: checked chunk by chunk in bounded memory
    blocks    a file on disk, read and written a block at a time

The order of tensors in the files we write: widest elements first, then by name. That keeps every tensor aligned to its
own element size for readers that map the file, and is plain name order where all types are equal, as in an update.

Source: the safetensors format, https://github.com/huggingface/safetensors#format
"""
