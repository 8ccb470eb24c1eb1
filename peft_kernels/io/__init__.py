"""Files of other libraries, read and written without them."""

from peft_kernels.io.adapterhub import AdapterHubCheckpoint, load_adapterhub, save_adapterhub

__all__ = ["AdapterHubCheckpoint", "load_adapterhub", "save_adapterhub"]
