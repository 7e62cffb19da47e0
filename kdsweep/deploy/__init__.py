"""The student in use: masks of one's own images, ONNX files, MLflow's registry."""
