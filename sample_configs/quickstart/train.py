"""Trains a small Keras model on every GPU that TensorFlow sees."""

import keras
import numpy as np
import tensorflow as tf

# One device adds up the gradients. NCCL would, but simulated GPUs have none.
add_up = tf.distribute.ReductionToOneDevice()
strategy = tf.distribute.MirroredStrategy(cross_device_ops=add_up)
with strategy.scope():
    layers = [keras.layers.Dense(1024, activation="relu"), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(optimizer="adam", loss="mse")

points = np.random.default_rng(seed=0).random((2048, 64), dtype="float32")
model.fit(points, points.sum(axis=1), batch_size=256, epochs=2, verbose=0)
print(f"Trained on {strategy.num_replicas_in_sync} device(s)")
