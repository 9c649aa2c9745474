"""`nrt convert` by its name among Megatron's tools: Hugging Face directory to `torch_dist` checkpoint.

python tools/convert_hf_to_megatron.py HF_DIR OUT_DIR [--add-token T --init-from X] [--no-tokenizer] [--verify]
"""

import sys

from nrt_megatron.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
