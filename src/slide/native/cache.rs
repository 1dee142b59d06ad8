//! Decoded tiles of one level, shared by all threads that read it.
//!
//! A tile is kept for as long as a planned read still needs it, and for no other reason: so every tile is decoded once,
//! and the memory held is that of the tiles whose neighbours are still to come. Where it does not suffice, a tile is not
//! kept and decoded again: tiles are needed in the order of rows, so those that are held already are needed sooner.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes of buffers kept for new tiles. Fresh memory is dear: the kernel clears each page on its first use.
const MAX_SPARE_BYTES: usize = 16 << 20;

/// Decoded tiles by index, bounded in bytes.
#[derive(Debug)]
pub(super) struct TileCache {
    state: Mutex<State>,
    /// Tells waiting threads that a decoding ended, well or not.
    decoded: Condvar,
}

#[derive(Debug, Default)]
struct State {
    capacity_bytes: usize,
    slots: HashMap<u32, Slot>,
    /// Planned reads of each tile that are still to come; empty without a plan.
    expected: Vec<u16>,
    spare: Vec<Vec<u8>>,
    held_bytes: usize,
    spare_bytes: usize,
    decode_count: u64,
}

#[derive(Debug)]
enum Slot {
    /// A thread decodes it.
    Pending,
    Ready(Arc<Vec<u8>>),
}

impl TileCache {
    /// A cache of at most `capacity_bytes`. `expected` is how often each tile will be asked for; a tile beyond its end,
    /// or asked for more often, is handed out but not kept.
    ///
    /// Tiles that readers hold just now are not counted: about one per thread.
    pub(super) fn new(capacity_bytes: usize, expected: Vec<u16>) -> Self {
        let state = State { capacity_bytes, expected, ..State::default() };
        Self { state: Mutex::new(state), decoded: Condvar::new() }
    }

    /// Lowers the capacity for what follows.
    pub(super) fn hold_at_most(&self, bytes: usize) {
        let mut state = self.lock();
        state.capacity_bytes = state.capacity_bytes.min(bytes);
    }

    /// The pixels of a tile; `decode` makes them if no thread has, in a buffer with room for `bytes` and undefined content.
    ///
    /// # Errors
    /// Those of `decode`. Every thread that waited for the tile then tries itself.
    pub(super) fn get<E>(
        &self,
        tile: u32,
        bytes: usize,
        decode: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
    ) -> Result<Arc<Vec<u8>>, E> {
        let mut state = self.lock();
        let mut buffer = loop {
            if let Some(rgb) = state.ready(tile) {
                return Ok(rgb);
            }
            if let Entry::Vacant(slot) = state.slots.entry(tile) {
                slot.insert(Slot::Pending);
                state.decode_count += 1;
                break state.spare_buffer(bytes);
            }
            state = self.decoded.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        let pending = PendingTile { cache: self, tile };
        decode(&mut buffer)?;
        Ok(pending.fill(buffer))
    }

    /// Decodes the first of `candidates` that a planned read needs, that no thread has or decodes, and for which there is
    /// room, at most `bytes` of it; says whether there was one. It is kept for those reads.
    ///
    /// # Errors
    /// Those of `decode`. The tile's own read then tries again, and tells.
    pub(super) fn ahead<E>(
        &self,
        mut candidates: impl Iterator<Item = u32>,
        bytes: usize,
        decode: impl FnOnce(u32, &mut Vec<u8>) -> Result<(), E>,
    ) -> Result<bool, E> {
        let mut state = self.lock();
        if state.held_bytes + bytes > state.capacity_bytes {
            return Ok(false);
        }
        let is_free = |tile: &u32| {
            state.expected.get(*tile as usize).is_some_and(|left| *left > 0) && !state.slots.contains_key(tile)
        };
        let Some(tile) = candidates.find(is_free) else { return Ok(false) };
        state.slots.insert(tile, Slot::Pending);
        state.decode_count += 1;
        let mut buffer = state.spare_buffer(bytes);
        drop(state);
        let pending = PendingTile { cache: self, tile };
        decode(tile, &mut buffer)?;
        pending.keep(buffer);
        Ok(true)
    }

    /// Whether a thread decodes the tile just now.
    pub(super) fn is_pending(&self, tile: u32) -> bool {
        matches!(self.lock().slots.get(&tile), Some(Slot::Pending))
    }

    /// Counts a planned read of a tile that will not come any more.
    pub(super) fn forgo(&self, tile: u32) {
        let mut state = self.lock();
        if state.count_use(tile) == 0 && matches!(state.slots.get(&tile), Some(Slot::Ready(_))) {
            state.drop_tile(tile);
        }
    }

    /// Takes a tile back that [`get`](Self::get) gave, so that its memory can serve another one. Optional.
    pub(super) fn give_back(&self, rgb: Arc<Vec<u8>>) {
        // Held by the cache or another reader as well, there is nothing to gain.
        if Arc::strong_count(&rgb) == 1 {
            self.lock().recycle(rgb);
        }
    }

    /// Tiles decoded so far, failures included, and bytes held now.
    #[cfg(test)]
    pub(super) fn stats(&self) -> (u64, usize) {
        let state = self.lock();
        (state.decode_count, state.held_bytes)
    }

    /// A thread that panicked while it held the lock left the state whole: every change is a single step.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Hands a decoded tile out and counts the use; `None` if it is not there, or not yet.
    fn ready(&mut self, tile: u32) -> Option<Arc<Vec<u8>>> {
        let Some(Slot::Ready(rgb)) = self.slots.get(&tile) else { return None };
        let rgb = Arc::clone(rgb);
        if self.count_use(tile) == 0 {
            self.drop_tile(tile);
        }
        Some(rgb)
    }

    /// Counts a planned read; returns how many are still to come.
    fn count_use(&mut self, tile: u32) -> u16 {
        self.expected.get_mut(tile as usize).map_or(0, |left| {
            *left = left.saturating_sub(1);
            *left
        })
    }

    fn drop_tile(&mut self, tile: u32) {
        if let Some(Slot::Ready(rgb)) = self.slots.remove(&tile) {
            self.held_bytes -= rgb.capacity();
            self.recycle(rgb);
        }
    }

    fn recycle(&mut self, rgb: Arc<Vec<u8>>) {
        if self.spare_bytes + rgb.capacity() <= MAX_SPARE_BYTES
            && let Some(buffer) = Arc::into_inner(rgb)
        {
            self.spare_bytes += buffer.capacity();
            self.spare.push(buffer);
        }
    }

    fn spare_buffer(&mut self, bytes: usize) -> Vec<u8> {
        let mut buffer = self.spare.pop().unwrap_or_default();
        self.spare_bytes -= buffer.capacity();
        buffer.reserve_exact(bytes.saturating_sub(buffer.len()));
        buffer
    }
}

/// A tile that this thread decodes; dropped unfilled, by an error or a panic, it wakes the threads that wait for it.
struct PendingTile<'a> {
    cache: &'a TileCache,
    tile: u32,
}

impl PendingTile<'_> {
    /// The tile, for the read that this thread is at.
    fn fill(self, buffer: Vec<u8>) -> Arc<Vec<u8>> {
        let mut state = self.cache.lock();
        let left = state.count_use(self.tile);
        self.hold(&mut state, buffer, left)
    }

    /// The tile for planned reads alone.
    fn keep(self, buffer: Vec<u8>) {
        let mut state = self.cache.lock();
        let left = state.expected.get(self.tile as usize).copied().unwrap_or(0);
        self.hold(&mut state, buffer, left);
    }

    /// Keeps the tile if planned reads are left and there is room.
    fn hold(&self, state: &mut State, buffer: Vec<u8>, left: u16) -> Arc<Vec<u8>> {
        let rgb = Arc::new(buffer);
        if left > 0 && state.held_bytes + rgb.capacity() <= state.capacity_bytes {
            state.held_bytes += rgb.capacity();
            state.slots.insert(self.tile, Slot::Ready(Arc::clone(&rgb)));
        }
        rgb
    }
}

impl Drop for PendingTile<'_> {
    fn drop(&mut self) {
        let mut state = self.cache.lock();
        if matches!(state.slots.get(&self.tile), Some(Slot::Pending)) {
            state.slots.remove(&self.tile);
        }
        drop(state);
        self.cache.decoded.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::*;

    fn get(cache: &TileCache, tile: u32) -> Arc<Vec<u8>> {
        cache.get(tile, 100, |rgb| paint(tile, rgb)).unwrap()
    }

    fn paint(tile: u32, rgb: &mut Vec<u8>) -> Result<(), ()> {
        rgb.resize(100, 0);
        rgb.fill(tile.to_le_bytes()[0]);
        Ok(())
    }

    #[test]
    fn a_tile_is_decoded_once_by_many_threads() {
        let cache = TileCache::new(10_000, vec![8; 20]);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for tile in 0..20 {
                        let rgb = cache.get(tile, 100, |rgb| {
                            std::thread::sleep(Duration::from_millis(2));
                            paint(tile, rgb)
                        });
                        assert_eq!(*rgb.unwrap(), vec![tile.to_le_bytes()[0]; 100]);
                    }
                });
            }
        });
        assert_eq!(cache.stats(), (20, 0));
    }

    #[test]
    fn a_tile_is_held_until_its_last_expected_use() {
        let cache = TileCache::new(1000, vec![0, 2, 1, 3]);
        for (tile, decode_count, held_bytes) in
            // The last two were not announced.
            [(1, 1, 100), (2, 2, 100), (3, 3, 200), (1, 3, 100), (3, 3, 100), (1, 4, 100), (9, 5, 100)]
        {
            get(&cache, tile);
            assert_eq!(cache.stats(), (decode_count, held_bytes), "{tile}");
        }
        cache.forgo(3);
        cache.forgo(3);
        cache.forgo(0);
        assert_eq!(cache.stats(), (5, 0));
    }

    #[test]
    fn what_does_not_fit_is_decoded_again() {
        let cache = TileCache::new(299, vec![2; 4]);
        (0..4).for_each(|tile| drop(get(&cache, tile)));
        assert_eq!(cache.stats(), (4, 200));
        (0..4).for_each(|tile| drop(get(&cache, tile)));
        assert_eq!(cache.stats(), (6, 0));
        let cache = TileCache::new(299, vec![2; 4]);
        cache.hold_at_most(100);
        (0..4).for_each(|tile| drop(get(&cache, tile)));
        assert_eq!(cache.stats(), (4, 100));
    }

    #[test]
    fn what_is_decoded_ahead_serves_the_planned_reads() {
        let cache = TileCache::new(250, vec![1, 0, 2, 1, 1]);
        let ahead = |from: u32| {
            cache.ahead(from..5, 100, |tile, rgb| {
                paint(tile, rgb).map_err(|()| "")?;
                if tile == 4 { Err("damaged") } else { Ok(()) }
            })
        };
        // 1 is not planned, so 2 comes next; after it 3; then there is no room.
        assert_eq!((ahead(1), ahead(1), ahead(0)), (Ok(true), Ok(true), Ok(false)));
        assert_eq!(cache.stats(), (2, 200));
        assert_eq!((get(&cache, 2)[0], get(&cache, 3)[0], get(&cache, 2)[0]), (2, 3, 2));
        assert_eq!(cache.stats(), (2, 0));
        // A failure leaves the tile to its own read; what has been read is not decoded again.
        assert_eq!(ahead(1), Err("damaged"));
        assert_eq!((get(&cache, 4)[0], cache.stats()), (4, (4, 0)));
        assert_eq!((ahead(1), ahead(0), get(&cache, 0)[0]), (Ok(false), Ok(true), 0));
        assert_eq!(cache.stats(), (5, 0));
    }

    #[test]
    fn a_failure_is_not_kept_and_wakes_the_others() {
        let cache = TileCache::new(1000, vec![9, 9]);
        let attempt_count = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let result = cache.get(1, 100, |_| {
                        attempt_count.fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(Duration::from_millis(2));
                        Err("damaged")
                    });
                    assert_eq!(result, Err("damaged"));
                });
            }
        });
        assert_eq!(attempt_count.into_inner(), 4);
        assert_eq!(get(&cache, 1)[0], 1);
    }

    #[test]
    fn buffers_are_used_again() {
        let cache = TileCache::new(100, vec![2; 4]);
        let first = get(&cache, 1);
        let address = first.as_ptr();
        // The cache still holds it for its second read.
        cache.give_back(first);
        cache.give_back(get(&cache, 1));
        // Were it freed, this one would likely get its memory.
        let between = Vec::<u8>::with_capacity(100);
        assert_eq!(get(&cache, 3).as_ptr(), address);
        assert_ne!(between.as_ptr(), address);
    }
}
