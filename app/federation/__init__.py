"""The decisions that only the service makes, without I/O: values come in, values go out."""
