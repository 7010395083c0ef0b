__version__ = "0.1.0"
DISTRIBUTION = "ddt-diffusion"  # that installs this package; PyPI's ddt is another project
