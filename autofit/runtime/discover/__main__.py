"""`python -m autofit.runtime.discover OUT.json [--allow-network] script.py arguments`: see the package."""

from autofit.runtime.discover.run import main

main()
