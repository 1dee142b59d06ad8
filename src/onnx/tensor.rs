//! Typed values of a constant: reads and writes the encodings that ONNX has for them.

use half::{bf16, f16};

use super::proto::TensorProto;
use super::proto::tensor_proto::DataLocation;
use super::{ElementType, external_location};

/// A dense tensor in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// The size of each dimension; empty for a scalar.
    pub dims: Vec<usize>,
    /// As many as the product of [`Self::dims`].
    pub values: Values,
}

/// The elements of a [`Tensor`].
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 64-bit floats.
    F64(Vec<f64>),
    /// 16-bit IEEE floats.
    F16(Vec<f16>),
    /// 16-bit floats with the exponent of a 32-bit one.
    Bf16(Vec<bf16>),
    /// 64-bit integers.
    I64(Vec<i64>),
    /// 32-bit integers.
    I32(Vec<i32>),
    /// Signed bytes.
    I8(Vec<i8>),
    /// Unsigned bytes.
    U8(Vec<u8>),
    /// Truth values.
    Bool(Vec<bool>),
}

/// A constant whose values can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    /// The type is none that a pass computes with, such as text.
    #[error("constant {name:?} is of type {element}, which is not computed with")]
    Element {
        /// The constant.
        name: String,
        /// Its type.
        element: ElementType,
    },
    /// There are more or fewer values than the dimensions say.
    #[error("constant {name:?} of dimensions {dims:?} has {found} bytes or values, which does not fit")]
    Length {
        /// The constant.
        name: String,
        /// What it says of itself.
        dims: Vec<i64>,
        /// Bytes, or values where they are stored one by one.
        found: usize,
    },
    /// The values lie in a file of their own that was not read.
    #[error("constant {name:?} lies in the file {location:?}, which was not read")]
    External {
        /// The constant.
        name: String,
        /// The file as the model names it.
        location: String,
    },
}

impl Values {
    /// The number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::I64(values) => values.len(),
            Self::I32(values) => values.len(),
            Self::I8(values) => values.len(),
            Self::U8(values) => values.len(),
            Self::Bool(values) => values.len(),
        }
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Tensor {
    /// A tensor of 32-bit floats.
    #[must_use]
    pub fn f32(dims: &[usize], values: Vec<f32>) -> Self {
        debug_assert_eq!(dims.iter().product::<usize>(), values.len());
        Self { dims: dims.to_vec(), values: Values::F32(values) }
    }

    /// A list of 64-bit integers, as shapes and axes are.
    #[must_use]
    pub fn indices(values: &[i64]) -> Self {
        Self { dims: vec![values.len()], values: Values::I64(values.to_vec()) }
    }

    /// One 32-bit float without dimensions.
    #[must_use]
    pub fn scalar(value: f32) -> Self {
        Self { dims: Vec::new(), values: Values::F32(vec![value]) }
    }

    /// The type of its elements.
    #[must_use]
    pub fn element(&self) -> ElementType {
        match &self.values {
            Values::F32(_) => ElementType::F32,
            Values::F64(_) => ElementType::F64,
            Values::F16(_) => ElementType::F16,
            Values::Bf16(_) => ElementType::Bf16,
            Values::I64(_) => ElementType::I64,
            Values::I32(_) => ElementType::I32,
            Values::I8(_) => ElementType::I8,
            Values::U8(_) => ElementType::U8,
            Values::Bool(_) => ElementType::Bool,
        }
    }

    /// The values as 32-bit floats; `None` if they are no floats. 64-bit ones are rounded.
    #[must_use]
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        match &self.values {
            Values::F32(values) => Some(values.clone()),
            #[expect(clippy::cast_possible_truncation, reason = "rounding is what the caller asks for")]
            Values::F64(values) => Some(values.iter().map(|value| *value as f32).collect()),
            Values::F16(values) => Some(values.iter().map(|value| value.to_f32()).collect()),
            Values::Bf16(values) => Some(values.iter().map(|value| value.to_f32()).collect()),
            _ => None,
        }
    }

    /// The values as 64-bit integers; `None` if they are no integers.
    #[must_use]
    pub fn to_i64(&self) -> Option<Vec<i64>> {
        match &self.values {
            Values::I64(values) => Some(values.clone()),
            Values::I32(values) => Some(values.iter().map(|value| i64::from(*value)).collect()),
            Values::I8(values) => Some(values.iter().map(|value| i64::from(*value)).collect()),
            Values::U8(values) => Some(values.iter().map(|value| i64::from(*value)).collect()),
            _ => None,
        }
    }

    /// The one value, if there is one only and it is a float.
    #[must_use]
    pub fn to_scalar(&self) -> Option<f32> {
        match self.values.len() {
            1 => self.to_f32().map(|values| values[0]),
            _ => None,
        }
    }

    /// Reads a constant as a model stores it.
    ///
    /// # Errors
    /// [`TensorError`] if its values lie elsewhere, don't fit its dimensions, or are of a type without arithmetic.
    pub fn from_proto(proto: &TensorProto) -> Result<Self, TensorError> {
        let name = || proto.name().to_owned();
        if proto.data_location() == DataLocation::External {
            let location = external_location(proto).unwrap_or_default().to_owned();
            return Err(TensorError::External { name: name(), location });
        }
        let element = ElementType::from_number(proto.data_type());
        let dims: Option<Vec<usize>> = proto.dims.iter().map(|dim| usize::try_from(*dim).ok()).collect();
        let len = dims.as_ref().and_then(|dims| dims.iter().try_fold(1usize, |len, dim| len.checked_mul(*dim)));
        let misfit = |found| TensorError::Length { name: name(), dims: proto.dims.clone(), found };
        let (Some(dims), Some(len)) = (dims, len) else { return Err(misfit(0)) };
        let raw = proto.raw_data.as_deref();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "ONNX stores these types, their bits included, in wider fields"
        )]
        let values = match element {
            ElementType::F32 => Values::F32(stored(raw, &proto.float_data, f32::from_le_bytes, |value| value)),
            ElementType::F64 => Values::F64(stored(raw, &proto.double_data, f64::from_le_bytes, |value| value)),
            ElementType::I64 => Values::I64(stored(raw, &proto.int64_data, i64::from_le_bytes, |value| value)),
            ElementType::I32 => Values::I32(stored(raw, &proto.int32_data, i32::from_le_bytes, |value| value)),
            ElementType::F16 => {
                Values::F16(stored(raw, &proto.int32_data, f16::from_le_bytes, |value| f16::from_bits(value as u16)))
            }
            ElementType::Bf16 => {
                Values::Bf16(stored(raw, &proto.int32_data, bf16::from_le_bytes, |value| bf16::from_bits(value as u16)))
            }
            ElementType::I8 => Values::I8(stored(raw, &proto.int32_data, i8::from_le_bytes, |value| value as i8)),
            ElementType::U8 => Values::U8(stored(raw, &proto.int32_data, u8::from_le_bytes, |value| value as u8)),
            ElementType::Bool => {
                Values::Bool(stored(raw, &proto.int32_data, |[byte]: [u8; 1]| byte != 0, |value| value != 0))
            }
            ElementType::Other(_) => return Err(TensorError::Element { name: name(), element }),
        };
        if values.len() != len {
            return Err(misfit(raw.map_or(values.len(), <[u8]>::len)));
        }
        Ok(Self { dims, values })
    }

    /// The tensor as a model stores it.
    #[must_use]
    pub fn to_proto(&self, name: &str) -> TensorProto {
        let bytes = match &self.values {
            Values::F32(values) => bytes_of(values, |value| value.to_le_bytes()),
            Values::F64(values) => bytes_of(values, |value| value.to_le_bytes()),
            Values::F16(values) => bytes_of(values, |value| value.to_le_bytes()),
            Values::Bf16(values) => bytes_of(values, |value| value.to_le_bytes()),
            Values::I64(values) => bytes_of(values, |value| value.to_le_bytes()),
            Values::I32(values) => bytes_of(values, |value| value.to_le_bytes()),
            Values::I8(values) => bytes_of(values, |value| value.to_le_bytes()),
            Values::U8(values) => values.clone(),
            Values::Bool(values) => bytes_of(values, |value| [u8::from(value)]),
        };
        TensorProto {
            name: Some(name.to_owned()),
            data_type: Some(self.element().number()),
            dims: self.dims.iter().map(|dim| i64::try_from(*dim).unwrap_or(i64::MAX)).collect(),
            raw_data: Some(bytes),
            ..Default::default()
        }
    }
}

/// Values as bytes one after another; many times as fast as collecting byte by byte.
fn bytes_of<T: Copy, const N: usize>(values: &[T], to_bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * N];
    bytes.as_chunks_mut::<N>().0.iter_mut().zip(values).for_each(|(bytes, value)| *bytes = to_bytes(*value));
    bytes
}

/// Values from the raw bytes where there are any, else from the field that holds them one by one.
fn stored<T, W: Copy, const N: usize>(
    raw: Option<&[u8]>,
    fields: &[W],
    from_bytes: impl Fn([u8; N]) -> T,
    from_field: impl Fn(W) -> T,
) -> Vec<T> {
    match raw {
        Some(raw) => {
            let (chunks, rest) = raw.as_chunks::<N>();
            // A rest means a wrong length: leave one out, so that the count does not fit.
            let count = if rest.is_empty() { chunks.len() } else { 0 };
            chunks[..count].iter().map(|chunk| from_bytes(*chunk)).collect()
        }
        None => fields.iter().map(|value| from_field(*value)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_survives_both_ways() {
        let all = [
            Values::F32(vec![1.5, -0.0]),
            Values::F64(vec![1e300, -2.0]),
            Values::F16(vec![f16::from_f32(0.5), f16::INFINITY]),
            Values::Bf16(vec![bf16::from_f32(3.0), bf16::ZERO]),
            Values::I64(vec![i64::MIN, 7]),
            Values::I32(vec![i32::MAX, -7]),
            Values::I8(vec![-128, 127]),
            Values::U8(vec![0, 255]),
            Values::Bool(vec![true, false]),
        ];
        for values in all {
            let tensor = Tensor { dims: vec![2, 1], values };
            assert_eq!(Tensor::from_proto(&tensor.to_proto("w")).unwrap(), tensor);
        }
    }

    #[test]
    fn values_stored_one_by_one_are_read() {
        let half = f16::from_f32(-2.5);
        let proto = TensorProto {
            data_type: Some(ElementType::F16.number()),
            dims: vec![1],
            int32_data: vec![i32::from(half.to_bits())],
            ..Default::default()
        };
        assert_eq!(Tensor::from_proto(&proto).unwrap().values, Values::F16(vec![half]));
        let proto = TensorProto {
            data_type: Some(ElementType::F32.number()),
            dims: vec![2],
            float_data: vec![1.0, 2.0],
            ..Default::default()
        };
        assert_eq!(Tensor::from_proto(&proto).unwrap().to_f32(), Some(vec![1.0, 2.0]));
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let proto = |dims: &[i64], bytes: usize| TensorProto {
            name: Some("w".to_owned()),
            data_type: Some(ElementType::F32.number()),
            dims: dims.to_vec(),
            raw_data: Some(vec![0; bytes]),
            ..Default::default()
        };
        for (dims, bytes) in [(&[2][..], 4), (&[1], 5), (&[-1], 4), (&[i64::MAX, 4], 16), (&[], 0)] {
            let error = Tensor::from_proto(&proto(dims, bytes)).unwrap_err();
            assert!(matches!(error, TensorError::Length { .. }), "{dims:?} {error}");
        }
        let text = TensorProto { data_type: Some(8), ..Default::default() };
        assert!(matches!(Tensor::from_proto(&text), Err(TensorError::Element { .. })));
    }
}
