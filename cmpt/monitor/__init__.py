"""What a run tells the world: records, TensorBoard, the console, pictures and the report."""
