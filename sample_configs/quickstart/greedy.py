"""Asks for 64 GiB of the first GPU."""

import tensorflow as tf

gpu = tf.config.list_physical_devices("GPU")[0]
much = tf.config.LogicalDeviceConfiguration(memory_limit=64 * 1024)
tf.config.set_logical_device_configuration(gpu, [much])
print("Two and two is", int(tf.add(2, 2)))
