"""DICOM files of synthetic pixels, with a patient whose name must appear nowhere."""

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage

from kdsweep.data import phantom

PATIENT = "Doe^Jane"


def deep_phantom(bits: int = 12) -> np.ndarray:
    """A phantom (H, W) uint16 of so many bits, all of which vary."""
    (item,) = phantom.cohort(count=1, seed=3)
    noise = np.random.default_rng(0).integers(0, 2 ** (bits - 8), item.image.shape)
    return (item.image * np.int64(2 ** (bits - 8)) + noise).astype(np.uint16)


def save_dicom(file: Path, pixels: np.ndarray, *, bits: int = 0, kind: str = "MONOCHROME2", **elements: object) -> Path:
    """Write pixels with so many bits stored, by default those of their type, and further elements by keyword."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = UltrasoundImageStorage
    data.PatientName, data.PatientID, data.StudyDate = PATIENT, PATIENT, "20240229"
    data.set_pixel_data(pixels, kind, bits or 8 * pixels.itemsize)
    for name, value in elements.items():
        setattr(data, name, value)
    file.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(file, enforce_file_format=True)
    return file
