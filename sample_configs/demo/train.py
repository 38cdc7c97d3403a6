"""Trains a small Keras model on every GPU that TensorFlow lists. It knows nothing of tfenv."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf


def examples(count: int = 2048) -> tuple[np.ndarray, np.ndarray]:
    """Points of the unit cube in 64 dimensions, and whether the first coordinate is larger than the second."""
    points = np.random.default_rng(seed=0).random((count, 64), dtype="float32")
    return points, (points[:, 0] > points[:, 1]).astype("int32")


def build_model() -> keras.Model:
    layers = [keras.layers.Dense(2048, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.layers.Input((64,)), *layers, keras.layers.Dense(2)])
    model.compile(optimizer="adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def main() -> None:
    # Summing gradients on one device needs no NCCL, which simulated GPUs and some installations lack.
    strategy = tf.distribute.MirroredStrategy(cross_device_ops=tf.distribute.ReductionToOneDevice())
    with strategy.scope():
        model = build_model()
    points, labels = examples()
    model.fit(points, labels, batch_size=256, epochs=2, verbose=2)
    print(f"trained on {strategy.num_replicas_in_sync} device(s)")


if __name__ == "__main__":
    main()
