"""`nrt export` by its name among Megatron's tools: checkpoint of any layout to a Hugging Face directory.

python tools/convert_megatron_to_hf.py CHECKPOINT_DIR OUT_DIR [--verify]
"""

import sys

from nrt_megatron.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "export")
    main()
