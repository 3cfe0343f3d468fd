"""What does a person see? Console, TensorBoard, JSON lines, warnings, charts."""
