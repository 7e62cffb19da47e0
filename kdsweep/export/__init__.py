"""Use of a trained student: masks of a user's images, ONNX files, MLflow's model registry."""
