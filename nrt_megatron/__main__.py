"""`python -m nrt_megatron` is `nrt`."""

from nrt_megatron.cli import main

if __name__ == "__main__":
    main()
