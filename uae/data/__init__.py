"""Images for training and evaluation."""

from uae.data.module import ImageData
from uae.data.photographs import ImageFolderData, PhotographData, StreamedData, TableData, WebDatasetData

__all__ = [
    "ImageData",
    "ImageFolderData",
    "PhotographData",
    "StreamedData",
    "TableData",
    "WebDatasetData",
]
