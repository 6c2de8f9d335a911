"`python -m fishnet_nb` is `fishnet-nb`."
import sys

from .cli import main

sys.exit(main())
