"""python -m benchmarks.codegen [--launched] [--help]: every shipped configuration, or the binaries
that real calls launch.
"""

import sys

from benchmarks.codegen import configurations, launched

if __name__ == "__main__":
    if "--launched" in sys.argv:
        sys.exit(launched.main([word for word in sys.argv[1:] if word != "--launched"]))
    sys.exit(configurations.main())
