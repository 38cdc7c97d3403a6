"""Generated from schemas/tfgpu.schema.json by tools/generate.py. Do not edit."""
# ruff: noqa
# mypy: ignore-errors
# pyright: basic
# fmt: off

import re


class JsonSchemaValueException(ValueError):
    """The first thing that is wrong."""


class _Patterns(dict):
    """Regular expressions by their text in the schema, compiled when first used."""

    def __missing__(self, text):
        # "$" also matches before a last newline, which JSON Schema does not mean.
        self[text] = compiled = re.compile(text[:-1] + r"\Z" if text.endswith("$") else text)
        return compiled


REGEX_PATTERNS = _Patterns()


def is_valid(table: object) -> bool:
    """Whether the schema has nothing against the policy table."""
    try:
        validate_urn_tfenv_schema_tfgpu_1(table)
    except JsonSchemaValueException:
        return False
    return True


def validate_urn_tfenv_schema_tfgpu_1(data, custom_formats={}, name_prefix=None):
    if not isinstance(data, (dict)):
        raise JsonSchemaValueException("" + (name_prefix or "data") + " must be object")
    data_is_dict = isinstance(data, dict)
    if data_is_dict:
        data_keys = set(data.keys())
        if "version" in data_keys:
            data_keys.remove("version")
            data__version = data["version"]
            if not isinstance(data__version, (int)) and not (isinstance(data__version, float) and data__version.is_integer()) or isinstance(data__version, bool):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".version must be integer")
            if not (isinstance(data__version, (int, float)) and not isinstance(data__version, bool) and data__version == 1):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".version must be one of [1]")
        if "on_error" in data_keys:
            data_keys.remove("on_error")
            data__onerror = data["on_error"]
            if not isinstance(data__onerror, (str)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".on_error must be string")
            if not (isinstance(data__onerror, str) and data__onerror == 'warn' or isinstance(data__onerror, str) and data__onerror == 'cpu' or isinstance(data__onerror, str) and data__onerror == 'fail'):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".on_error must be one of ['warn', 'cpu', 'fail']")
        if "gpu" in data_keys:
            data_keys.remove("gpu")
            data__gpu = data["gpu"]
            validate___definitions_gpu(data__gpu, custom_formats, (name_prefix or "data") + ".gpu")
        if "ceiling" in data_keys:
            data_keys.remove("ceiling")
            data__ceiling = data["ceiling"]
            validate___definitions_ceiling(data__ceiling, custom_formats, (name_prefix or "data") + ".ceiling")
        if "user" in data_keys:
            data_keys.remove("user")
            data__user = data["user"]
            if not isinstance(data__user, (dict)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".user must be object")
            data__user_is_dict = isinstance(data__user, dict)
            if data__user_is_dict:
                data__user_keys = set(data__user.keys())
                for data__user_key, data__user_val in data__user.items():
                    if REGEX_PATTERNS['^[^/]+$'].search(data__user_key):
                        if data__user_key in data__user_keys:
                            data__user_keys.remove(data__user_key)
                        validate___definitions_subject(data__user_val, custom_formats, (name_prefix or "data") + ".user.{data__user_key}".format(**locals()))
                if data__user_keys:
                    raise JsonSchemaValueException("" + (name_prefix or "data") + ".user must not contain "+str(data__user_keys)+" properties")
        if "group" in data_keys:
            data_keys.remove("group")
            data__group = data["group"]
            if not isinstance(data__group, (dict)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".group must be object")
            data__group_is_dict = isinstance(data__group, dict)
            if data__group_is_dict:
                data__group_keys = set(data__group.keys())
                for data__group_key, data__group_val in data__group.items():
                    if REGEX_PATTERNS['^[^/]+$'].search(data__group_key):
                        if data__group_key in data__group_keys:
                            data__group_keys.remove(data__group_key)
                        validate___definitions_subject(data__group_val, custom_formats, (name_prefix or "data") + ".group.{data__group_key}".format(**locals()))
                if data__group_keys:
                    raise JsonSchemaValueException("" + (name_prefix or "data") + ".group must not contain "+str(data__group_keys)+" properties")
        if "project" in data_keys:
            data_keys.remove("project")
            data__project = data["project"]
            if not isinstance(data__project, (dict)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".project must be object")
            data__project_is_dict = isinstance(data__project, dict)
            if data__project_is_dict:
                data__project_keys = set(data__project.keys())
                for data__project_key, data__project_val in data__project.items():
                    if REGEX_PATTERNS['^/'].search(data__project_key):
                        if data__project_key in data__project_keys:
                            data__project_keys.remove(data__project_key)
                        validate___definitions_subject(data__project_val, custom_formats, (name_prefix or "data") + ".project.{data__project_key}".format(**locals()))
                if data__project_keys:
                    raise JsonSchemaValueException("" + (name_prefix or "data") + ".project must not contain "+str(data__project_keys)+" properties")
        if "observe" in data_keys:
            data_keys.remove("observe")
            data__observe = data["observe"]
            if not isinstance(data__observe, (dict)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".observe must be object")
            data__observe_is_dict = isinstance(data__observe, dict)
            if data__observe_is_dict:
                data__observe_keys = set(data__observe.keys())
                if "tell" in data__observe_keys:
                    data__observe_keys.remove("tell")
                    data__observe__tell = data__observe["tell"]
                    if not isinstance(data__observe__tell, (bool)):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".observe.tell must be boolean")
                if "gpu" in data__observe_keys:
                    data__observe_keys.remove("gpu")
                    data__observe__gpu = data__observe["gpu"]
                    validate___definitions_gpu(data__observe__gpu, custom_formats, (name_prefix or "data") + ".observe.gpu")
                if "ceiling" in data__observe_keys:
                    data__observe_keys.remove("ceiling")
                    data__observe__ceiling = data__observe["ceiling"]
                    validate___definitions_ceiling(data__observe__ceiling, custom_formats, (name_prefix or "data") + ".observe.ceiling")
                if "user" in data__observe_keys:
                    data__observe_keys.remove("user")
                    data__observe__user = data__observe["user"]
                    if not isinstance(data__observe__user, (dict)):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".observe.user must be object")
                    data__observe__user_is_dict = isinstance(data__observe__user, dict)
                    if data__observe__user_is_dict:
                        data__observe__user_keys = set(data__observe__user.keys())
                        for data__observe__user_key, data__observe__user_val in data__observe__user.items():
                            if REGEX_PATTERNS['^[^/]+$'].search(data__observe__user_key):
                                if data__observe__user_key in data__observe__user_keys:
                                    data__observe__user_keys.remove(data__observe__user_key)
                                validate___definitions_subject(data__observe__user_val, custom_formats, (name_prefix or "data") + ".observe.user.{data__observe__user_key}".format(**locals()))
                        if data__observe__user_keys:
                            raise JsonSchemaValueException("" + (name_prefix or "data") + ".observe.user must not contain "+str(data__observe__user_keys)+" properties")
                if "group" in data__observe_keys:
                    data__observe_keys.remove("group")
                    data__observe__group = data__observe["group"]
                    if not isinstance(data__observe__group, (dict)):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".observe.group must be object")
                    data__observe__group_is_dict = isinstance(data__observe__group, dict)
                    if data__observe__group_is_dict:
                        data__observe__group_keys = set(data__observe__group.keys())
                        for data__observe__group_key, data__observe__group_val in data__observe__group.items():
                            if REGEX_PATTERNS['^[^/]+$'].search(data__observe__group_key):
                                if data__observe__group_key in data__observe__group_keys:
                                    data__observe__group_keys.remove(data__observe__group_key)
                                validate___definitions_subject(data__observe__group_val, custom_formats, (name_prefix or "data") + ".observe.group.{data__observe__group_key}".format(**locals()))
                        if data__observe__group_keys:
                            raise JsonSchemaValueException("" + (name_prefix or "data") + ".observe.group must not contain "+str(data__observe__group_keys)+" properties")
                if "project" in data__observe_keys:
                    data__observe_keys.remove("project")
                    data__observe__project = data__observe["project"]
                    if not isinstance(data__observe__project, (dict)):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".observe.project must be object")
                    data__observe__project_is_dict = isinstance(data__observe__project, dict)
                    if data__observe__project_is_dict:
                        data__observe__project_keys = set(data__observe__project.keys())
                        for data__observe__project_key, data__observe__project_val in data__observe__project.items():
                            if REGEX_PATTERNS['^/'].search(data__observe__project_key):
                                if data__observe__project_key in data__observe__project_keys:
                                    data__observe__project_keys.remove(data__observe__project_key)
                                validate___definitions_subject(data__observe__project_val, custom_formats, (name_prefix or "data") + ".observe.project.{data__observe__project_key}".format(**locals()))
                        if data__observe__project_keys:
                            raise JsonSchemaValueException("" + (name_prefix or "data") + ".observe.project must not contain "+str(data__observe__project_keys)+" properties")
                if data__observe_keys:
                    raise JsonSchemaValueException("" + (name_prefix or "data") + ".observe must not contain "+str(data__observe_keys)+" properties")
        if "audit" in data_keys:
            data_keys.remove("audit")
            data__audit = data["audit"]
            if not isinstance(data__audit, (dict)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".audit must be object")
            data__audit_is_dict = isinstance(data__audit, dict)
            if data__audit_is_dict:
                data__audit_keys = set(data__audit.keys())
                if "stderr" in data__audit_keys:
                    data__audit_keys.remove("stderr")
                    data__audit__stderr = data__audit["stderr"]
                    if not isinstance(data__audit__stderr, (str)):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".audit.stderr must be string")
                    if not (isinstance(data__audit__stderr, str) and data__audit__stderr == 'summary' or isinstance(data__audit__stderr, str) and data__audit__stderr == 'none' or isinstance(data__audit__stderr, str) and data__audit__stderr == 'json'):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".audit.stderr must be one of ['summary', 'none', 'json']")
                if "file" in data__audit_keys:
                    data__audit_keys.remove("file")
                    data__audit__file = data__audit["file"]
                    if not isinstance(data__audit__file, (str)):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".audit.file must be string")
                    if isinstance(data__audit__file, str):
                        data__audit__file_len = len(data__audit__file)
                        if data__audit__file_len < 1:
                            raise JsonSchemaValueException("" + (name_prefix or "data") + ".audit.file must be longer than or equal to 1 characters")
                if "syslog" in data__audit_keys:
                    data__audit_keys.remove("syslog")
                    data__audit__syslog = data__audit["syslog"]
                    if not isinstance(data__audit__syslog, (bool)):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".audit.syslog must be boolean")
                if data__audit_keys:
                    raise JsonSchemaValueException("" + (name_prefix or "data") + ".audit must not contain "+str(data__audit_keys)+" properties")
        if "machine" in data_keys:
            data_keys.remove("machine")
            data__machine = data["machine"]
            if not isinstance(data__machine, (dict)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine must be object")
            data__machine_is_dict = isinstance(data__machine, dict)
            if data__machine_is_dict:
                data__machine_keys = set(data__machine.keys())
                if "allow_disable" in data__machine_keys:
                    data__machine_keys.remove("allow_disable")
                    data__machine__allowdisable = data__machine["allow_disable"]
                    if not isinstance(data__machine__allowdisable, (bool)):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine.allow_disable must be boolean")
                if "allow_project_files" in data__machine_keys:
                    data__machine_keys.remove("allow_project_files")
                    data__machine__allowprojectfiles = data__machine["allow_project_files"]
                    if not isinstance(data__machine__allowprojectfiles, (bool)):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine.allow_project_files must be boolean")
                if "trusted_owners" in data__machine_keys:
                    data__machine_keys.remove("trusted_owners")
                    data__machine__trustedowners = data__machine["trusted_owners"]
                    if not isinstance(data__machine__trustedowners, (list, tuple)):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine.trusted_owners must be array")
                    data__machine__trustedowners_is_list = isinstance(data__machine__trustedowners, (list, tuple))
                    if data__machine__trustedowners_is_list:
                        data__machine__trustedowners_len = len(data__machine__trustedowners)
                        if data__machine__trustedowners_len > 256:
                            raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine.trusted_owners must contain less than or equal to 256 items")
                        for data__machine__trustedowners_x, data__machine__trustedowners_item in enumerate(data__machine__trustedowners):
                            if not isinstance(data__machine__trustedowners_item, (str)):
                                raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine.trusted_owners[{data__machine__trustedowners_x}]".format(**locals()) + " must be string")
                            if isinstance(data__machine__trustedowners_item, str):
                                data__machine__trustedowners_item_len = len(data__machine__trustedowners_item)
                                if data__machine__trustedowners_item_len < 1:
                                    raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine.trusted_owners[{data__machine__trustedowners_x}]".format(**locals()) + " must be longer than or equal to 1 characters")
                                if not REGEX_PATTERNS['^[^/]+$'].search(data__machine__trustedowners_item):
                                    raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine.trusted_owners[{data__machine__trustedowners_x}]".format(**locals()) + " must match pattern ^[^/]+$")
                if "process_overhead" in data__machine_keys:
                    data__machine_keys.remove("process_overhead")
                    data__machine__processoverhead = data__machine["process_overhead"]
                    if not isinstance(data__machine__processoverhead, (str)):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine.process_overhead must be string")
                    if isinstance(data__machine__processoverhead, str):
                        if not REGEX_PATTERNS['^(?:[Nn][Oo][Nn][Ee]|[0-9]{1,15}(?:\\.[0-9]{1,6})? ?[KkMmGgTt][Ii]?[Bb])$'].search(data__machine__processoverhead):
                            raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine.process_overhead must match pattern ^(?:[Nn][Oo][Nn][Ee]|[0-9]{1,15}(?:\\.[0-9]{1,6})? ?[KkMmGgTt][Ii]?[Bb])$")
                if "revision" in data__machine_keys:
                    data__machine_keys.remove("revision")
                    data__machine__revision = data__machine["revision"]
                    if not isinstance(data__machine__revision, (str)):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine.revision must be string")
                    if isinstance(data__machine__revision, str):
                        data__machine__revision_len = len(data__machine__revision)
                        if data__machine__revision_len < 1:
                            raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine.revision must be longer than or equal to 1 characters")
                        if data__machine__revision_len > 64:
                            raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine.revision must be shorter than or equal to 64 characters")
                if "wall" in data__machine_keys:
                    data__machine_keys.remove("wall")
                    data__machine__wall = data__machine["wall"]
                    if not isinstance(data__machine__wall, (str)):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine.wall must be string")
                    if not (isinstance(data__machine__wall, str) and data__machine__wall == 'auto' or isinstance(data__machine__wall, str) and data__machine__wall == 'off'):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine.wall must be one of ['auto', 'off']")
                if "shards_per_gpu" in data__machine_keys:
                    data__machine_keys.remove("shards_per_gpu")
                    data__machine__shardspergpu = data__machine["shards_per_gpu"]
                    if not isinstance(data__machine__shardspergpu, (int)) and not (isinstance(data__machine__shardspergpu, float) and data__machine__shardspergpu.is_integer()) or isinstance(data__machine__shardspergpu, bool):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine.shards_per_gpu must be integer")
                    if isinstance(data__machine__shardspergpu, (int, float)) and not isinstance(data__machine__shardspergpu, bool):
                        if data__machine__shardspergpu < 1:
                            raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine.shards_per_gpu must be bigger than or equal to 1")
                        if data__machine__shardspergpu > 1000000:
                            raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine.shards_per_gpu must be smaller than or equal to 1000000")
                if data__machine_keys:
                    raise JsonSchemaValueException("" + (name_prefix or "data") + ".machine must not contain "+str(data__machine_keys)+" properties")
        if data_keys:
            raise JsonSchemaValueException("" + (name_prefix or "data") + " must not contain "+str(data_keys)+" properties")
    return data

def validate___definitions_subject(data, custom_formats={}, name_prefix=None):
    if not isinstance(data, (dict)):
        raise JsonSchemaValueException("" + (name_prefix or "data") + " must be object")
    data_is_dict = isinstance(data, dict)
    if data_is_dict:
        data_keys = set(data.keys())
        if "expires" in data_keys:
            data_keys.remove("expires")
            data__expires = data["expires"]
            if not isinstance(data__expires, (str)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".expires must be string")
            if isinstance(data__expires, str):
                if not REGEX_PATTERNS['^[0-9]{4}-[0-9]{2}-[0-9]{2}$'].search(data__expires):
                    raise JsonSchemaValueException("" + (name_prefix or "data") + ".expires must match pattern ^[0-9]{4}-[0-9]{2}-[0-9]{2}$")
        if "reason" in data_keys:
            data_keys.remove("reason")
            data__reason = data["reason"]
            if not isinstance(data__reason, (str)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".reason must be string")
            if isinstance(data__reason, str):
                data__reason_len = len(data__reason)
                if data__reason_len < 1:
                    raise JsonSchemaValueException("" + (name_prefix or "data") + ".reason must be longer than or equal to 1 characters")
                if data__reason_len > 200:
                    raise JsonSchemaValueException("" + (name_prefix or "data") + ".reason must be shorter than or equal to 200 characters")
        if "gpu" in data_keys:
            data_keys.remove("gpu")
            data__gpu = data["gpu"]
            validate___definitions_gpu(data__gpu, custom_formats, (name_prefix or "data") + ".gpu")
        if "ceiling" in data_keys:
            data_keys.remove("ceiling")
            data__ceiling = data["ceiling"]
            validate___definitions_ceiling(data__ceiling, custom_formats, (name_prefix or "data") + ".ceiling")
        if data_keys:
            raise JsonSchemaValueException("" + (name_prefix or "data") + " must not contain "+str(data_keys)+" properties")
    return data

def validate___definitions_ceiling(data, custom_formats={}, name_prefix=None):
    if not isinstance(data, (dict)):
        raise JsonSchemaValueException("" + (name_prefix or "data") + " must be object")
    data_is_dict = isinstance(data, dict)
    if data_is_dict:
        data_keys = set(data.keys())
        if "allowed_devices" in data_keys:
            data_keys.remove("allowed_devices")
            data__alloweddevices = data["allowed_devices"]
            validate___definitions_devices(data__alloweddevices, custom_formats, (name_prefix or "data") + ".allowed_devices")
        if "max_devices" in data_keys:
            data_keys.remove("max_devices")
            data__maxdevices = data["max_devices"]
            if not isinstance(data__maxdevices, (int)) and not (isinstance(data__maxdevices, float) and data__maxdevices.is_integer()) or isinstance(data__maxdevices, bool):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".max_devices must be integer")
            if isinstance(data__maxdevices, (int, float)) and not isinstance(data__maxdevices, bool):
                if data__maxdevices < 0:
                    raise JsonSchemaValueException("" + (name_prefix or "data") + ".max_devices must be bigger than or equal to 0")
                if data__maxdevices > 1024:
                    raise JsonSchemaValueException("" + (name_prefix or "data") + ".max_devices must be smaller than or equal to 1024")
        if "memory_limit" in data_keys:
            data_keys.remove("memory_limit")
            data__memorylimit = data["memory_limit"]
            validate___definitions_process_limit(data__memorylimit, custom_formats, (name_prefix or "data") + ".memory_limit")
        if "memory_total" in data_keys:
            data_keys.remove("memory_total")
            data__memorytotal = data["memory_total"]
            validate___definitions_limit(data__memorytotal, custom_formats, (name_prefix or "data") + ".memory_total")
        if "require_memory_growth" in data_keys:
            data_keys.remove("require_memory_growth")
            data__requirememorygrowth = data["require_memory_growth"]
            if not isinstance(data__requirememorygrowth, (bool)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".require_memory_growth must be boolean")
        if "require_grant" in data_keys:
            data_keys.remove("require_grant")
            data__requiregrant = data["require_grant"]
            if not (isinstance(data__requiregrant, bool) and data__requiregrant is True or isinstance(data__requiregrant, bool) and data__requiregrant is False or isinstance(data__requiregrant, str) and data__requiregrant == 'always'):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".require_grant must be one of [True, False, 'always']")
        if data_keys:
            raise JsonSchemaValueException("" + (name_prefix or "data") + " must not contain "+str(data_keys)+" properties")
    return data

def validate___definitions_limit(data, custom_formats={}, name_prefix=None):
    if not isinstance(data, (str)):
        raise JsonSchemaValueException("" + (name_prefix or "data") + " must be string")
    if isinstance(data, str):
        if not REGEX_PATTERNS['^(?:[Nn][Oo][Nn][Ee]|[0-9]{1,15}(?:\\.[0-9]{1,6})? ?[KkMmGgTt][Ii]?[Bb]|(?:100(?:\\.0{1,6})?|[0-9]{1,2}(?:\\.[0-9]{1,6})?) ?%)$'].search(data):
            raise JsonSchemaValueException("" + (name_prefix or "data") + " must match pattern ^(?:[Nn][Oo][Nn][Ee]|[0-9]{1,15}(?:\\.[0-9]{1,6})? ?[KkMmGgTt][Ii]?[Bb]|(?:100(?:\\.0{1,6})?|[0-9]{1,2}(?:\\.[0-9]{1,6})?) ?%)$")
    return data

def validate___definitions_process_limit(data, custom_formats={}, name_prefix=None):
    if not isinstance(data, (str)):
        raise JsonSchemaValueException("" + (name_prefix or "data") + " must be string")
    if isinstance(data, str):
        if not REGEX_PATTERNS['^(?:granted|[Nn][Oo][Nn][Ee]|[0-9]{1,15}(?:\\.[0-9]{1,6})? ?[KkMmGgTt][Ii]?[Bb]|(?:100(?:\\.0{1,6})?|[0-9]{1,2}(?:\\.[0-9]{1,6})?) ?%)$'].search(data):
            raise JsonSchemaValueException("" + (name_prefix or "data") + " must match pattern ^(?:granted|[Nn][Oo][Nn][Ee]|[0-9]{1,15}(?:\\.[0-9]{1,6})? ?[KkMmGgTt][Ii]?[Bb]|(?:100(?:\\.0{1,6})?|[0-9]{1,2}(?:\\.[0-9]{1,6})?) ?%)$")
    return data

def validate___definitions_devices(data, custom_formats={}, name_prefix=None):
    data_any_of_count1 = 0
    if not data_any_of_count1:
        try:
            if not isinstance(data, (str)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + " must be string")
            if not (isinstance(data, str) and data == 'none'):
                raise JsonSchemaValueException("" + (name_prefix or "data") + " must be one of ['none']")
            data_any_of_count1 += 1
        except JsonSchemaValueException: pass
    if not data_any_of_count1:
        try:
            if not isinstance(data, (list, tuple)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + " must be array")
            data_is_list = isinstance(data, (list, tuple))
            if data_is_list:
                data_len = len(data)
                if data_len > 256:
                    raise JsonSchemaValueException("" + (name_prefix or "data") + " must contain less than or equal to 256 items")
                for data_x, data_item in enumerate(data):
                    validate___definitions_selector(data_item, custom_formats, (name_prefix or "data") + "[{data_x}]".format(**locals()))
            data_any_of_count1 += 1
        except JsonSchemaValueException: pass
    if not data_any_of_count1:
        raise JsonSchemaValueException("" + (name_prefix or "data") + " cannot be validated by any definition")
    return data

def validate___definitions_selector(data, custom_formats={}, name_prefix=None):
    data_any_of_count2 = 0
    if not data_any_of_count2:
        try:
            if not isinstance(data, (int)) and not (isinstance(data, float) and data.is_integer()) or isinstance(data, bool):
                raise JsonSchemaValueException("" + (name_prefix or "data") + " must be integer")
            if isinstance(data, (int, float)) and not isinstance(data, bool):
                if data < 0:
                    raise JsonSchemaValueException("" + (name_prefix or "data") + " must be bigger than or equal to 0")
                if data > 9999:
                    raise JsonSchemaValueException("" + (name_prefix or "data") + " must be smaller than or equal to 9999")
            data_any_of_count2 += 1
        except JsonSchemaValueException: pass
    if not data_any_of_count2:
        try:
            if not isinstance(data, (str)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + " must be string")
            if isinstance(data, str):
                if not REGEX_PATTERNS['^(?:[0-9]{1,4}|name:.+|GPU-[0-9A-Fa-f][0-9A-Fa-f-]*|MIG-(?:GPU-)?[0-9A-Fa-f][0-9A-Fa-f-]*(?:/[0-9]{1,3}/[0-9]{1,3})?)$'].search(data):
                    raise JsonSchemaValueException("" + (name_prefix or "data") + " must match pattern ^(?:[0-9]{1,4}|name:.+|GPU-[0-9A-Fa-f][0-9A-Fa-f-]*|MIG-(?:GPU-)?[0-9A-Fa-f][0-9A-Fa-f-]*(?:/[0-9]{1,3}/[0-9]{1,3})?)$")
            data_any_of_count2 += 1
        except JsonSchemaValueException: pass
    if not data_any_of_count2:
        raise JsonSchemaValueException("" + (name_prefix or "data") + " cannot be validated by any definition")
    return data

def validate___definitions_gpu(data, custom_formats={}, name_prefix=None):
    if not isinstance(data, (dict)):
        raise JsonSchemaValueException("" + (name_prefix or "data") + " must be object")
    data_is_dict = isinstance(data, dict)
    if data_is_dict:
        data_keys = set(data.keys())
        if "visible_devices" in data_keys:
            data_keys.remove("visible_devices")
            data__visibledevices = data["visible_devices"]
            validate___definitions_visible_devices(data__visibledevices, custom_formats, (name_prefix or "data") + ".visible_devices")
        if "memory_growth" in data_keys:
            data_keys.remove("memory_growth")
            data__memorygrowth = data["memory_growth"]
            if not isinstance(data__memorygrowth, (bool)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".memory_growth must be boolean")
        if "memory_limit" in data_keys:
            data_keys.remove("memory_limit")
            data__memorylimit = data["memory_limit"]
            validate___definitions_process_limit(data__memorylimit, custom_formats, (name_prefix or "data") + ".memory_limit")
        if "allocator" in data_keys:
            data_keys.remove("allocator")
            data__allocator = data["allocator"]
            if not isinstance(data__allocator, (str)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".allocator must be string")
            if not (isinstance(data__allocator, str) and data__allocator == 'bfc' or isinstance(data__allocator, str) and data__allocator == 'cuda_malloc' or isinstance(data__allocator, str) and data__allocator == 'cuda_malloc_async'):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".allocator must be one of ['bfc', 'cuda_malloc', 'cuda_malloc_async']")
        if "frameworks" in data_keys:
            data_keys.remove("frameworks")
            data__frameworks = data["frameworks"]
            validate___definitions_frameworks(data__frameworks, custom_formats, (name_prefix or "data") + ".frameworks")
        if "device" in data_keys:
            data_keys.remove("device")
            data__device = data["device"]
            if not isinstance(data__device, (list, tuple)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".device must be array")
            data__device_is_list = isinstance(data__device, (list, tuple))
            if data__device_is_list:
                data__device_len = len(data__device)
                if data__device_len > 64:
                    raise JsonSchemaValueException("" + (name_prefix or "data") + ".device must contain less than or equal to 64 items")
                for data__device_x, data__device_item in enumerate(data__device):
                    validate___definitions_device(data__device_item, custom_formats, (name_prefix or "data") + ".device[{data__device_x}]".format(**locals()))
        if data_keys:
            raise JsonSchemaValueException("" + (name_prefix or "data") + " must not contain "+str(data_keys)+" properties")
    return data

def validate___definitions_device(data, custom_formats={}, name_prefix=None):
    if not isinstance(data, (dict)):
        raise JsonSchemaValueException("" + (name_prefix or "data") + " must be object")
    data_is_dict = isinstance(data, dict)
    if data_is_dict:
        data__missing_keys = set(['match']) - data.keys()
        if data__missing_keys:
            raise JsonSchemaValueException("" + (name_prefix or "data") + " must contain ")
        data_keys = set(data.keys())
        if "match" in data_keys:
            data_keys.remove("match")
            data__match = data["match"]
            validate___definitions_selector(data__match, custom_formats, (name_prefix or "data") + ".match")
        if "memory_limit" in data_keys:
            data_keys.remove("memory_limit")
            data__memorylimit = data["memory_limit"]
            validate___definitions_process_limit(data__memorylimit, custom_formats, (name_prefix or "data") + ".memory_limit")
        if "logical_devices" in data_keys:
            data_keys.remove("logical_devices")
            data__logicaldevices = data["logical_devices"]
            if not isinstance(data__logicaldevices, (list, tuple)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".logical_devices must be array")
            data__logicaldevices_is_list = isinstance(data__logicaldevices, (list, tuple))
            if data__logicaldevices_is_list:
                data__logicaldevices_len = len(data__logicaldevices)
                if data__logicaldevices_len > 64:
                    raise JsonSchemaValueException("" + (name_prefix or "data") + ".logical_devices must contain less than or equal to 64 items")
                for data__logicaldevices_x, data__logicaldevices_item in enumerate(data__logicaldevices):
                    validate___definitions_size(data__logicaldevices_item, custom_formats, (name_prefix or "data") + ".logical_devices[{data__logicaldevices_x}]".format(**locals()))
        if data_keys:
            raise JsonSchemaValueException("" + (name_prefix or "data") + " must not contain "+str(data_keys)+" properties")
    return data

def validate___definitions_size(data, custom_formats={}, name_prefix=None):
    if not isinstance(data, (str)):
        raise JsonSchemaValueException("" + (name_prefix or "data") + " must be string")
    if isinstance(data, str):
        if not REGEX_PATTERNS['^(?:[0-9]{1,15}(?:\\.[0-9]{1,6})? ?[KkMmGgTt][Ii]?[Bb]|(?:100(?:\\.0{1,6})?|[0-9]{1,2}(?:\\.[0-9]{1,6})?) ?%)$'].search(data):
            raise JsonSchemaValueException("" + (name_prefix or "data") + " must match pattern ^(?:[0-9]{1,15}(?:\\.[0-9]{1,6})? ?[KkMmGgTt][Ii]?[Bb]|(?:100(?:\\.0{1,6})?|[0-9]{1,2}(?:\\.[0-9]{1,6})?) ?%)$")
    return data

def validate___definitions_frameworks(data, custom_formats={}, name_prefix=None):
    if not isinstance(data, (dict)):
        raise JsonSchemaValueException("" + (name_prefix or "data") + " must be object")
    data_is_dict = isinstance(data, dict)
    if data_is_dict:
        data_keys = set(data.keys())
        if "tensorflow" in data_keys:
            data_keys.remove("tensorflow")
            data__tensorflow = data["tensorflow"]
            validate___definitions_size(data__tensorflow, custom_formats, (name_prefix or "data") + ".tensorflow")
        if "jax" in data_keys:
            data_keys.remove("jax")
            data__jax = data["jax"]
            validate___definitions_size(data__jax, custom_formats, (name_prefix or "data") + ".jax")
        if "torch" in data_keys:
            data_keys.remove("torch")
            data__torch = data["torch"]
            validate___definitions_size(data__torch, custom_formats, (name_prefix or "data") + ".torch")
        if data_keys:
            raise JsonSchemaValueException("" + (name_prefix or "data") + " must not contain "+str(data_keys)+" properties")
    return data

def validate___definitions_visible_devices(data, custom_formats={}, name_prefix=None):
    data_any_of_count3 = 0
    if not data_any_of_count3:
        try:
            if not isinstance(data, (str)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + " must be string")
            if not (isinstance(data, str) and data == 'all' or isinstance(data, str) and data == 'none'):
                raise JsonSchemaValueException("" + (name_prefix or "data") + " must be one of ['all', 'none']")
            data_any_of_count3 += 1
        except JsonSchemaValueException: pass
    if not data_any_of_count3:
        try:
            if not isinstance(data, (list, tuple)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + " must be array")
            data_is_list = isinstance(data, (list, tuple))
            if data_is_list:
                data_len = len(data)
                if data_len > 256:
                    raise JsonSchemaValueException("" + (name_prefix or "data") + " must contain less than or equal to 256 items")
                for data_x, data_item in enumerate(data):
                    validate___definitions_selector(data_item, custom_formats, (name_prefix or "data") + "[{data_x}]".format(**locals()))
            data_any_of_count3 += 1
        except JsonSchemaValueException: pass
    if not data_any_of_count3:
        try:
            validate___definitions_choice(data, custom_formats, (name_prefix or "data") + "")
            data_any_of_count3 += 1
        except JsonSchemaValueException: pass
    if not data_any_of_count3:
        try:
            validate___definitions_rank(data, custom_formats, (name_prefix or "data") + "")
            data_any_of_count3 += 1
        except JsonSchemaValueException: pass
    if not data_any_of_count3:
        raise JsonSchemaValueException("" + (name_prefix or "data") + " cannot be validated by any definition")
    return data

def validate___definitions_rank(data, custom_formats={}, name_prefix=None):
    if not isinstance(data, (dict)):
        raise JsonSchemaValueException("" + (name_prefix or "data") + " must be object")
    data_is_dict = isinstance(data, dict)
    if data_is_dict:
        data__missing_keys = set(['rank']) - data.keys()
        if data__missing_keys:
            raise JsonSchemaValueException("" + (name_prefix or "data") + " must contain ")
        data_keys = set(data.keys())
        if "rank" in data_keys:
            data_keys.remove("rank")
            data__rank = data["rank"]
            data__rank_any_of_count4 = 0
            if not data__rank_any_of_count4:
                try:
                    if not isinstance(data__rank, (str)):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".rank must be string")
                    if not (isinstance(data__rank, str) and data__rank == 'auto'):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".rank must be one of ['auto']")
                    data__rank_any_of_count4 += 1
                except JsonSchemaValueException: pass
            if not data__rank_any_of_count4:
                try:
                    if not isinstance(data__rank, (int)) and not (isinstance(data__rank, float) and data__rank.is_integer()) or isinstance(data__rank, bool):
                        raise JsonSchemaValueException("" + (name_prefix or "data") + ".rank must be integer")
                    if isinstance(data__rank, (int, float)) and not isinstance(data__rank, bool):
                        if data__rank < 0:
                            raise JsonSchemaValueException("" + (name_prefix or "data") + ".rank must be bigger than or equal to 0")
                        if data__rank > 1024:
                            raise JsonSchemaValueException("" + (name_prefix or "data") + ".rank must be smaller than or equal to 1024")
                    data__rank_any_of_count4 += 1
                except JsonSchemaValueException: pass
            if not data__rank_any_of_count4:
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".rank cannot be validated by any definition")
        if data_keys:
            raise JsonSchemaValueException("" + (name_prefix or "data") + " must not contain "+str(data_keys)+" properties")
    return data

def validate___definitions_choice(data, custom_formats={}, name_prefix=None):
    if not isinstance(data, (dict)):
        raise JsonSchemaValueException("" + (name_prefix or "data") + " must be object")
    data_is_dict = isinstance(data, dict)
    if data_is_dict:
        data__missing_keys = set(['count']) - data.keys()
        if data__missing_keys:
            raise JsonSchemaValueException("" + (name_prefix or "data") + " must contain ")
        data_keys = set(data.keys())
        if "count" in data_keys:
            data_keys.remove("count")
            data__count = data["count"]
            if not isinstance(data__count, (int)) and not (isinstance(data__count, float) and data__count.is_integer()) or isinstance(data__count, bool):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".count must be integer")
            if isinstance(data__count, (int, float)) and not isinstance(data__count, bool):
                if data__count < 1:
                    raise JsonSchemaValueException("" + (name_prefix or "data") + ".count must be bigger than or equal to 1")
                if data__count > 1024:
                    raise JsonSchemaValueException("" + (name_prefix or "data") + ".count must be smaller than or equal to 1024")
        if "prefer" in data_keys:
            data_keys.remove("prefer")
            data__prefer = data["prefer"]
            if not isinstance(data__prefer, (str)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".prefer must be string")
            if not (isinstance(data__prefer, str) and data__prefer == 'most_free'):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".prefer must be one of ['most_free']")
        if "min_free" in data_keys:
            data_keys.remove("min_free")
            data__minfree = data["min_free"]
            validate___definitions_size(data__minfree, custom_formats, (name_prefix or "data") + ".min_free")
        if "when_busy" in data_keys:
            data_keys.remove("when_busy")
            data__whenbusy = data["when_busy"]
            if not isinstance(data__whenbusy, (str)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".when_busy must be string")
            if not (isinstance(data__whenbusy, str) and data__whenbusy == 'wait' or isinstance(data__whenbusy, str) and data__whenbusy == 'cpu' or isinstance(data__whenbusy, str) and data__whenbusy == 'fail' or isinstance(data__whenbusy, str) and data__whenbusy == 'share'):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".when_busy must be one of ['wait', 'cpu', 'fail', 'share']")
        if "timeout" in data_keys:
            data_keys.remove("timeout")
            data__timeout = data["timeout"]
            if not isinstance(data__timeout, (str)):
                raise JsonSchemaValueException("" + (name_prefix or "data") + ".timeout must be string")
            if isinstance(data__timeout, str):
                if not REGEX_PATTERNS['^[0-9]{1,9}(?:\\.[0-9]{1,3})? ?(?:s|min|h|d)$'].search(data__timeout):
                    raise JsonSchemaValueException("" + (name_prefix or "data") + ".timeout must match pattern ^[0-9]{1,9}(?:\\.[0-9]{1,3})? ?(?:s|min|h|d)$")
        if data_keys:
            raise JsonSchemaValueException("" + (name_prefix or "data") + " must not contain "+str(data_keys)+" properties")
    return data
