//! The input of a batch: memory that is kept from one batch to the next, filled with prepared tiles.

use std::fmt::Debug;

use half::f16;
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::value::{DynValueRef, PrimitiveTensorElementType, Tensor, TensorRef};
use rayon::prelude::*;

use crate::inference::card::ModelCard;
use crate::inference::contract::{Contract, Layout};
use crate::inference::device::Device;
use crate::inference::pixels::{self, Table, TileResizer};
use crate::onnx::ElementType;

/// The input of the next batch, in the element type of the model.
pub(super) enum Input {
    F32 {
        /// What every byte becomes.
        table: Box<Table<f32>>,
        memory: Memory<f32>,
    },
    F16 {
        table: Box<Table<f16>>,
        memory: Memory<f16>,
    },
    /// Bytes as they are.
    U8(Memory<u8>),
}

impl Input {
    pub(super) fn new(card: &ModelCard, contract: &Contract, page_locked: Option<Allocator>) -> Self {
        let table = pixels::normalisation(card);
        match contract.element {
            ElementType::F16 => Self::F16 { table: Box::new(pixels::to_f16(&table)), memory: Memory::new(page_locked) },
            ElementType::U8 => Self::U8(Memory::new(page_locked)),
            _ => Self::F32 { table: Box::new(table), memory: Memory::new(page_locked) },
        }
    }

    /// Writes `tiles`, resized if there is a resizer, as the first of `batch` images; the rest repeat the last tile.
    pub(super) fn fill(
        &mut self,
        tiles: &[&[u8]],
        batch: usize,
        layout: Layout,
        resizer: Option<&mut TileResizer>,
    ) -> Result<(), ort::Error> {
        match self {
            Self::F32 { table, memory } => {
                fill(memory, tiles, batch, resizer, |rgb, into| pixels::write(rgb, table, layout, into))
            }
            Self::F16 { table, memory } => {
                fill(memory, tiles, batch, resizer, |rgb, into| pixels::write(rgb, table, layout, into))
            }
            Self::U8(memory) if layout == Layout::Nhwc => {
                fill(memory, tiles, batch, resizer, |rgb, into| into.copy_from_slice(rgb))
            }
            Self::U8(memory) => {
                let table = pixels::identity();
                fill(memory, tiles, batch, resizer, |rgb, into| pixels::write(rgb, &table, layout, into))
            }
        }
    }

    /// The batch as a tensor of that shape, not copied.
    pub(super) fn view(&self, shape: [usize; 4]) -> Result<DynValueRef<'_>, ort::Error> {
        Ok(match self {
            Self::F32 { memory, .. } => TensorRef::from_array_view((shape, memory.values()))?.into_dyn(),
            Self::F16 { memory, .. } => TensorRef::from_array_view((shape, memory.values()))?.into_dyn(),
            Self::U8(memory) => TensorRef::from_array_view((shape, memory.values()))?.into_dyn(),
        })
    }
}

/// An allocator of page-locked memory, which a GPU reads several times faster; `None` for the CPU.
pub(super) fn page_locked(session: &ort::session::Session, device: Device) -> Option<Allocator> {
    let Device::Cuda { index } = device else { return None };
    let index = i32::try_from(index).ok()?;
    let memory =
        MemoryInfo::new(AllocationDevice::CUDA_PINNED, index, AllocatorType::Device, MemoryType::CPUInput).ok()?;
    Allocator::new(session, memory).ok()
}

/// Writes `tiles` by `write` as the first of `batch` images; see [`Input::fill`].
fn fill<T: Element>(
    memory: &mut Memory<T>,
    tiles: &[&[u8]],
    batch: usize,
    resizer: Option<&mut TileResizer>,
    write: impl Fn(&[u8], &mut [T]) + Sync,
) -> Result<(), ort::Error> {
    let tile_len = tiles.first().map_or(0, |tile| tile.len());
    let image_len = resizer.as_ref().map_or(tile_len, |resizer| resizer.image_len());
    let values = memory.reserve(image_len * batch)?;
    let images = values.chunks_exact_mut(image_len.max(1));
    match resizer {
        Some(resizer) => {
            for (image, tile) in images.zip(tiles) {
                write(resizer.resize(tile).ok_or_else(|| ort::Error::new("a tile can't be resized"))?, image);
            }
        }
        None if tiles.len() < super::SHARED_WORK => images.zip(tiles).for_each(|(image, tile)| write(tile, image)),
        None => {
            let images = values.par_chunks_exact_mut(image_len.max(1));
            images.zip(tiles).for_each(|(image, tile)| write(tile, image));
        }
    }
    // Not zeros: a model that quantises over the whole batch should meet nothing but tissue.
    for filler in tiles.len()..batch {
        values.copy_within((tiles.len() - 1) * image_len..tiles.len() * image_len, filler * image_len);
    }
    Ok(())
}

/// An element of an input.
pub(super) trait Element: PrimitiveTensorElementType + Copy + Default + Debug + Send + 'static {}
impl<T: PrimitiveTensorElementType + Copy + Default + Debug + Send + 'static> Element for T {}

/// Memory that grows with the largest batch so far.
pub(super) struct Memory<T: Element> {
    /// Page-locked where there is one.
    allocator: Option<Allocator>,
    block: Block<T>,
    /// Elements in use.
    len: usize,
}

enum Block<T: Element> {
    Host(Vec<T>),
    /// From an allocator: the tensor owns it, and how many elements it has.
    Allocated(Tensor<T>, usize),
}

impl<T: Element> Memory<T> {
    fn new(allocator: Option<Allocator>) -> Self {
        Self { allocator, block: Block::Host(Vec::new()), len: 0 }
    }

    /// `len` elements to be written; what was there before may be lost.
    fn reserve(&mut self, len: usize) -> Result<&mut [T], ort::Error> {
        let capacity = match &self.block {
            Block::Host(values) => values.len(),
            Block::Allocated(_, capacity) => *capacity,
        };
        if capacity < len {
            self.block = match &self.allocator {
                Some(allocator) => Block::allocate(allocator, len)?,
                None => Block::Host(vec![T::default(); len]),
            };
        }
        self.len = len;
        Ok(match &mut self.block {
            Block::Host(values) => &mut values[..len],
            #[expect(unsafe_code, reason = "ort 2.0.0-rc.15 refuses to borrow page-locked memory of ONNX Runtime 1.23")]
            // SAFETY: the tensor holds at least `len` elements, which `allocate` initialised, in memory of the host;
            // the borrow of the block keeps the tensor alive and unshared.
            Block::Allocated(tensor, _) => unsafe {
                std::slice::from_raw_parts_mut(tensor.data_ptr_mut().cast::<T>(), len)
            },
        })
    }

    fn values(&self) -> &[T] {
        match &self.block {
            Block::Host(values) => &values[..self.len],
            #[expect(unsafe_code, reason = "as in `reserve`")]
            // SAFETY: as in `reserve`, shared.
            Block::Allocated(tensor, _) => unsafe {
                std::slice::from_raw_parts(tensor.data_ptr().cast::<T>(), self.len)
            },
        }
    }
}

impl<T: Element> Block<T> {
    fn allocate(allocator: &Allocator, len: usize) -> Result<Self, ort::Error> {
        let mut tensor = Tensor::<T>::new(allocator, [len])?;
        #[expect(unsafe_code, reason = "a tensor's memory begins uninitialised")]
        // SAFETY: the tensor is new and has room for `len` elements.
        unsafe {
            let start = tensor.data_ptr_mut().cast::<T>();
            for at in 0..len {
                start.add(at).write(T::default());
            }
        }
        Ok(Self::Allocated(tensor, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_an_allocator_is_used_like_the_hosts() {
        crate::native::onnx_runtime().unwrap();
        for allocator in [None, Some(Allocator::default())] {
            let mut input = Input::U8(Memory::new(allocator));
            let tiles: [&[u8]; 2] = [&[1, 2, 3], &[4, 5, 6]];
            let values = |input: &Input| match input {
                Input::U8(memory) => memory.values().to_vec(),
                _ => Vec::new(),
            };
            input.fill(&tiles, 3, Layout::Nhwc, None).unwrap();
            assert_eq!(values(&input), [1, 2, 3, 4, 5, 6, 4, 5, 6]);
            input.fill(&tiles[1..], 1, Layout::Nchw, None).unwrap();
            assert_eq!(values(&input), [4, 5, 6]);
            let many: Vec<Vec<u8>> = (0..20).map(|tile| vec![tile; 3]).collect();
            input.fill(&many.iter().map(Vec::as_slice).collect::<Vec<_>>(), 20, Layout::Nhwc, None).unwrap();
            assert_eq!(values(&input), many.concat());
        }
    }
}
