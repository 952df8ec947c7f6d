// Tensors as arguments of bound functions: anything that speaks DLPack or the buffer protocol,
// on the CPU, without a copy. torch tensors are read through the C function table they offer
// (DLPack 1.3, __dlpack_c_exchange_api__), which takes some 50 ns where the __dlpack__ method
// takes microseconds. Only borrowed: valid until the call returns.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

namespace greenroom {

constexpr int kMaxDims = 6;

struct Tensor {
    void* data = nullptr;
    int dims = 0;
    std::array<std::int64_t, kMaxDims> shape{};
    std::array<std::int64_t, kMaxDims> strides{};  // in elements
    nanobind::dlpack::dtype dtype{};
    nanobind::ndarray<nanobind::ro> owner;  // set where the array had to be exported
};

// The same, but the caller is going to write to it: read-only arrays are refused.
struct OutTensor : Tensor {};

namespace detail {

struct DLTensor {
    void* data;
    std::int32_t device_type, device_id;
    std::int32_t ndim;
    nanobind::dlpack::dtype dtype;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};

struct ExchangeTable {
    std::uint32_t major, minor;
    void* previous;
    void *allocate, *to_managed, *from_managed;
    int (*to_dltensor)(void* object, DLTensor* out);
};

// The function table of a Python type, or null. Looked up once for the type seen last.
inline const ExchangeTable* exchange_table(PyTypeObject* type) {
    static PyTypeObject* known_type = nullptr;  // guarded by the GIL
    static const ExchangeTable* known_table = nullptr;
    if (type == known_type) return known_table;
    const ExchangeTable* table = nullptr;
    PyObject* capsule =
        PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
    if (capsule) {
        table =
            static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
        Py_DECREF(capsule);
    }
    PyErr_Clear();
    if (!table || table->major != 1 || !table->to_dltensor) return nullptr;
    Py_INCREF(type);  // keeps the address from being used for another type
    known_type = type;
    known_table = table;
    return table;
}

inline bool borrow(PyObject* object, Tensor& to) {
    const ExchangeTable* table = exchange_table(Py_TYPE(object));
    if (!table) return false;
    DLTensor from{};
    if (table->to_dltensor(object, &from) != 0) {
        PyErr_Clear();
        return false;
    }
    if (from.device_type != nanobind::device::cpu::value || from.ndim > kMaxDims) return false;
    to.data = static_cast<char*>(from.data) + from.byte_offset;
    to.dims = from.ndim;
    to.dtype = from.dtype;
    std::int64_t dense = 1;
    for (int i = from.ndim - 1; i >= 0; --i) {
        to.shape[i] = from.shape[i];
        to.strides[i] = from.strides ? from.strides[i] : dense;
        dense *= from.shape[i];
    }
    return true;
}

template <class Array>
bool export_array(nanobind::handle source, Tensor& to) {
    Array array;
    if (!nanobind::try_cast(source, array) || array.ndim() > kMaxDims) return false;
    to.data = const_cast<void*>(static_cast<const void*>(array.data()));
    to.dims = static_cast<int>(array.ndim());
    to.dtype = array.dtype();
    for (int i = 0; i < to.dims; ++i) {
        to.shape[i] = static_cast<std::int64_t>(array.shape(i));
        to.strides[i] = array.stride(i);
    }
    to.owner = nanobind::ndarray<nanobind::ro>(array);
    return true;
}

}  // namespace detail

// Errors name the argument. Shapes are written with -1 for "any".
[[noreturn]] inline void refuse(const char* name, const std::string& what) {
    throw std::invalid_argument(std::string(name) + ": " + what);
}

inline std::string shape_text(const std::int64_t* shape, int dims) {
    std::string text = "(";
    for (int i = 0; i < dims; ++i)
        text += (i ? ", " : "") + (shape[i] < 0 ? std::string("*") : std::to_string(shape[i]));
    return text + ")";
}

inline void expect_shape(const Tensor& t, const char* name,
                         std::initializer_list<std::int64_t> shape) {
    bool same = t.dims == static_cast<int>(shape.size());
    for (int i = 0; same && i < t.dims; ++i)
        same = shape.begin()[i] < 0 || shape.begin()[i] == t.shape[i];
    if (!same)
        refuse(name, "expected shape " + shape_text(shape.begin(), static_cast<int>(shape.size())) +
                         ", got " + shape_text(t.shape.data(), t.dims));
}

template <class T>
bool has_type(const Tensor& t) {
    return t.dtype == nanobind::dtype<T>();
}

inline bool is_half(const Tensor& t) {
    return t.dtype.code == static_cast<std::uint8_t>(nanobind::dlpack::dtype_code::Float) &&
           t.dtype.bits == 16 && t.dtype.lanes == 1;
}

// Data of a tensor whose last `dense` dimensions lie without gaps; T and the shape are checked.
template <class T>
T* data_of(const Tensor& t, const char* name, std::initializer_list<std::int64_t> shape,
           int dense = kMaxDims) {
    expect_shape(t, name, shape);
    if (!has_type<T>(t))
        refuse(name, std::string("expected ") + (std::is_floating_point_v<T> ? "float" : "int") +
                         std::to_string(8 * sizeof(T)));
    std::int64_t stride = 1;
    for (int i = t.dims - 1; i >= 0 && dense-- > 0; --i) {
        if (t.shape[i] > 1 && t.strides[i] != stride) refuse(name, "must be contiguous");
        stride *= t.shape[i];
    }
    return static_cast<T*>(t.data);
}

}  // namespace greenroom

NAMESPACE_BEGIN(NB_NAMESPACE)
NAMESPACE_BEGIN(detail)

template <>
struct type_caster<greenroom::Tensor> {
    NB_TYPE_CASTER(greenroom::Tensor, const_name("Tensor"))
    bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
        return greenroom::detail::borrow(source.ptr(), value) ||
               greenroom::detail::export_array<ndarray<ro, device::cpu>>(source, value);
    }
};

template <>
struct type_caster<greenroom::OutTensor> {
    NB_TYPE_CASTER(greenroom::OutTensor, const_name("Tensor"))
    bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
        return greenroom::detail::borrow(source.ptr(), value) ||
               greenroom::detail::export_array<ndarray<device::cpu>>(source, value);
    }
};

NAMESPACE_END(detail)
NAMESPACE_END(NB_NAMESPACE)
