//! Reads labelled images: a folder with a folder per class, or a table of images with their classes or masks.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};

use image::DynamicImage;
use walkdir::WalkDir;

use super::{ExperimentError, images, one_class, results};
use crate::engine::inputs::{csv_line, csv_problem};
use crate::inference::{ModelCard, Task};

/// Images with what is right about them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Labelled {
    /// Where they come from.
    pub(super) path: PathBuf,
    pub(super) items: Vec<Item>,
    /// Number of groups; what is drawn for intervals.
    pub(super) groups: usize,
    /// Names of the groups; empty if each image is its own.
    pub(super) group_names: Vec<String>,
    /// Files in class folders that are no images.
    pub(super) others: Vec<PathBuf>,
    /// Of a model with one class the name that stands for what is not it, if one does.
    pub(super) not: Option<String>,
}

/// One image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) image: PathBuf,
    pub(super) truth: Truth,
    /// Index of its group, such as its patient.
    pub(super) group: usize,
}

/// What is right about an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Truth {
    /// Index of its class; of a model with one class [`one_class::NOT`] for what is not it.
    Class(usize),
    /// A grey picture of its size whose values are indices of classes, 255 for what has none.
    Mask(PathBuf),
    /// A grey picture of its size of a model with one class: 1 or 255 where that is, 0 elsewhere.
    Region(PathBuf),
}

impl Truth {
    /// The class of each pixel `[row, column]` of an image of that size, below `classes`, or 255 for none; empty of an
    /// image that has one class as a whole.
    pub(super) fn pixels(&self, size: (u32, u32), classes: usize) -> Result<Vec<u8>, ExperimentError> {
        match self {
            Self::Class(_) => Ok(Vec::new()),
            Self::Mask(path) => mask(path, size, classes),
            Self::Region(path) => region(path, size),
        }
    }
}

impl Labelled {
    /// Whether groups were named, rather than each image being its own.
    pub(super) fn has_groups(&self) -> bool {
        !self.group_names.is_empty()
    }

    pub(super) fn images(&self) -> Vec<PathBuf> {
        self.items.iter().map(|item| item.image.clone()).collect()
    }

    /// Every file that is read: images, masks and the table, or the folder.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let masks = self.items.iter().filter_map(|item| match &item.truth {
            Truth::Mask(path) | Truth::Region(path) => Some(path.clone()),
            Truth::Class(_) => None,
        });
        self.images().into_iter().chain(masks).chain([self.path.clone()]).collect()
    }
}

/// Reads the labels for a model of that card; images are looked at when they are needed.
pub(super) fn read(path: &Path, card: &ModelCard) -> Result<Labelled, ExperimentError> {
    let wrong = |reason: &str| Err(ExperimentError::Labels { path: path.to_owned(), reason: reason.to_owned() });
    if card.task == Task::Features {
        return wrong("features have no classes to hold against labels");
    }
    let found = if path.is_dir() {
        if card.task == Task::Segmentation {
            return wrong("a folder per class has no masks; a segmentation needs a CSV with the columns path,mask");
        }
        folder(path, card)?
    } else {
        table(path, card)?
    };
    let items = &found.items;
    if items.is_empty() {
        return wrong("holds no labelled image");
    }
    let is_of_first = |item: &Item| item.truth == Truth::Class(0);
    if card.task == Task::Classification && one_class::is_alone(card) && !items.iter().any(is_of_first) {
        return wrong(&format!("no image is labelled {:?}, the model's only class", card.classes[0].name));
    }
    Ok(found)
}

/// A mask with only indices below `classes` and 255 in it.
fn mask(path: &Path, size: (u32, u32), classes: usize) -> Result<Vec<u8>, ExperimentError> {
    let mask = grey(path, size)?;
    let is_none = |value: &&u8| usize::from(**value) >= classes && **value != u8::MAX;
    if let Some(value) = mask.iter().find(is_none) {
        let reason = format!("holds the value {value}, but there are classes 0 to {} (255: none)", classes - 1);
        return Err(labels_error(path, reason));
    }
    Ok(mask)
}

/// A mask of a model's only class, as indices of what is told apart.
fn region(path: &Path, size: (u32, u32)) -> Result<Vec<u8>, ExperimentError> {
    let mut mask = grey(path, size)?;
    if let Some(value) = mask.iter().find(|value| !matches!(value, 0 | 1 | 255)) {
        let reason = format!("holds the value {value}, but of one class a mask has 0, and 1 or 255 where the class is");
        return Err(labels_error(path, reason));
    }
    if mask.contains(&1) && mask.contains(&255) {
        // Where 1 is the class, 255 may be meant for what has no label.
        return Err(labels_error(path, "holds both 1 and 255, of which one stands for the class".to_owned()));
    }
    mask.iter_mut().for_each(|value| *value = u8::from(*value == 0));
    Ok(mask)
}

/// The values of a grey picture of that size, `[row, column]`.
fn grey(path: &Path, size: (u32, u32)) -> Result<Vec<u8>, ExperimentError> {
    let DynamicImage::ImageLuma8(picture) = images::open(path)? else {
        return Err(labels_error(path, "is no 8-bit grey image, whose values stand for classes".to_owned()));
    };
    let (width, height) = picture.dimensions();
    if (width, height) != size {
        let reason = format!("is {width} × {height} px, but its image {} × {}", size.0, size.1);
        return Err(labels_error(path, reason));
    }
    Ok(picture.into_raw())
}

/// The images of class folders, each its own group, and what lies there and is no image.
fn folder(path: &Path, card: &ModelCard) -> Result<Labelled, ExperimentError> {
    let (mut items, mut others, mut names) = (Vec::<Item>::new(), Vec::new(), Names::new(card));
    let mut seen: HashMap<PathBuf, PathBuf> = HashMap::new();
    for entry in entries(path, 1) {
        let entry = entry?;
        if images::is_image(entry.path()) {
            return Err(labels_error(entry.path(), "lies in the folder of no class".to_owned()));
        }
        if !entry.file_type().is_dir() {
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        let class = names.class(&name).map_err(|reason| labels_error(entry.path(), reason))?;
        for file in entries(entry.path(), usize::MAX) {
            // A link to nothing is no entry, but an image that can't be read, or another file.
            let (file, is_folder) = match file {
                Ok(file) => (file.path().to_owned(), file.file_type().is_dir()),
                Err(ExperimentError::File { path, .. }) if images::is_dangling(&path) => (path, false),
                Err(error) => return Err(error),
            };
            if images::is_image(&file) {
                if let Some(first) = seen.insert(results::resolved(&file), file.clone()) {
                    return Err(labels_error(&file, format!("is the same image as {}", first.display())));
                }
                items.push(Item { image: file, truth: Truth::Class(class), group: items.len() });
            } else if !is_folder {
                others.push(file);
            }
        }
    }
    let (path, groups, group_names) = (path.to_owned(), items.len(), Vec::new());
    Ok(Labelled { path, items, groups, group_names, others, not: names.not })
}

/// What lies in a folder, by name; links are followed.
fn entries(folder: &Path, depth: usize) -> impl Iterator<Item = Result<walkdir::DirEntry, ExperimentError>> {
    let folder = folder.to_owned();
    let walk = WalkDir::new(&folder).follow_links(true).min_depth(1).max_depth(depth).sort_by_file_name();
    walk.into_iter().map(move |entry| {
        entry.map_err(|error| ExperimentError::File {
            path: error.path().unwrap_or(&folder).to_owned(),
            doing: "read",
            source: error.into(),
        })
    })
}

/// The images of a table. Paths are below the table's folder.
fn table(path: &Path, card: &ModelCard) -> Result<Labelled, ExperimentError> {
    let text = std::fs::read_to_string(path).map_err(|source| match source.kind() {
        io::ErrorKind::InvalidData => labels_error(path, "is neither a folder nor a CSV in UTF-8".to_owned()),
        _ => ExperimentError::File { path: path.to_owned(), doing: "read", source },
    })?;
    let broken = |error: csv::Error| labels_error(path, csv_problem(&text, &error));
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(text.as_bytes());
    let headers = reader.headers().map_err(broken)?.clone();
    let columns = Columns::of(&headers, card).map_err(|reason| labels_error(path, reason))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut group_numbers: BTreeMap<String, usize> = BTreeMap::new();
    let mut names = Names::new(card);
    let mut items: Vec<Item> = Vec::new();
    let mut seen: HashMap<PathBuf, (u64, Truth)> = HashMap::new();
    for record in reader.records() {
        let record = record.map_err(broken)?;
        let line = || csv_line(&text, record.position());
        let problem = |reason: String| labels_error(path, format!("line {}: {reason}", line()));
        let field = |index: usize| record.get(index).unwrap_or_default();
        let below = |name: &str| {
            let file = folder.join(name);
            if file.is_file() { Ok(file) } else { Err(problem(format!("{name:?} is no file"))) }
        };
        let image = below(field(columns.image))?;
        let truth = match card.task {
            Task::Segmentation if one_class::is_alone(card) => Truth::Region(below(field(columns.truth))?),
            Task::Segmentation => Truth::Mask(below(field(columns.truth))?),
            _ => Truth::Class(names.class(field(columns.truth)).map_err(problem)?),
        };
        if let Some((first, other)) = seen.insert(results::resolved(&image), (line(), truth.clone())) {
            // Counted twice, it would make the intervals too narrow.
            let how = if other == truth { "the same" } else { "another" };
            let name = field(columns.image);
            return Err(problem(format!(
                "{name:?} is the image of line {first} again, with {how} {}",
                columns.of_truth
            )));
        }
        if columns.group.is_some_and(|column| field(column).is_empty()) {
            return Err(problem("has no group".to_owned()));
        }
        let next = group_numbers.len();
        let group = columns.group.map(|group| *group_numbers.entry(field(group).to_owned()).or_insert(next));
        items.push(Item { image, truth, group: group.unwrap_or(items.len()) });
    }
    let groups = if columns.group.is_some() { group_numbers.len() } else { items.len() };
    let mut group_names = vec![String::new(); group_numbers.len()];
    group_numbers.into_iter().for_each(|(name, index)| group_names[index] = name);
    Ok(Labelled { path: path.to_owned(), items, groups, group_names, others: Vec::new(), not: names.not })
}

/// Where a table has what.
struct Columns {
    image: usize,
    truth: usize,
    /// `label` or `mask`.
    of_truth: &'static str,
    group: Option<usize>,
}

impl Columns {
    fn of(headers: &csv::StringRecord, card: &ModelCard) -> Result<Self, String> {
        let of_truth = if card.task == Task::Segmentation { "mask" } else { "label" };
        let column = |names: &[&str]| {
            let is_one = |header: &&str| names.iter().any(|name| header.eq_ignore_ascii_case(name));
            let found: Vec<&str> = headers.iter().filter(is_one).collect();
            match found.len() {
                0 | 1 => Ok(headers.iter().position(|header| is_one(&header))),
                _ => Err(format!("has {} columns for the {}: {}", found.len(), names[0], found.join(", "))),
            }
        };
        match (column(&["image", "path"])?, column(&[of_truth])?, column(&["group"])?) {
            (Some(image), Some(truth), group) => Ok(Self { image, truth, of_truth, group }),
            _ => {
                let found = headers.iter().collect::<Vec<_>>().join(", ");
                Err(format!("needs the columns path and {of_truth}, and has: {found}"))
            }
        }
    }
}

/// Which classes the names of labels stand for.
///
/// Names are the classes' own. Of a model with one class 1 is that class too, and one other name, whatever it is, stands
/// for what is not it.
struct Names<'a> {
    card: &'a ModelCard,
    /// The name of what is not the only class, once it was met.
    not: Option<String>,
}

impl<'a> Names<'a> {
    fn new(card: &'a ModelCard) -> Self {
        Self { card, not: None }
    }

    fn class(&mut self, name: &str) -> Result<usize, String> {
        let classes = &self.card.classes;
        if let Some(class) = classes.iter().position(|class| class.name == name) {
            return Ok(class);
        }
        match classes.as_slice() {
            [only] if !name.is_empty() => self.beside(&only.name, name),
            _ => {
                let known = classes.iter().map(|class| class.name.as_str()).collect::<Vec<_>>().join(", ");
                Err(format!("{name:?} is none of the model's classes: {known}"))
            }
        }
    }

    /// What a name beside that of the only class stands for.
    fn beside(&mut self, only: &str, name: &str) -> Result<usize, String> {
        // A class may itself be called 0, and then 1 is the other one.
        if name == "1" && only != "0" {
            return Ok(0);
        }
        if name.to_lowercase() == only.to_lowercase() {
            return Err(format!(
                "{name:?} differs from {only:?}, the model's only class, by case alone: write it alike"
            ));
        }
        let not = self.not.get_or_insert_with(|| name.to_owned());
        if not == name {
            return Ok(one_class::NOT);
        }
        Err(format!("{name:?} and {not:?} can't both be what is not {only:?}, the model's only class"))
    }
}

fn labels_error(path: &Path, reason: String) -> ExperimentError {
    ExperimentError::Labels { path: path.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::{BareModel, Class};
    use image::{GrayImage, Luma, RgbImage};
    use std::fs;

    fn card(name: &str) -> ModelCard {
        ModelCard::load(&Path::new("models").join(name), &BareModel::default()).unwrap()
    }

    fn picture(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        RgbImage::new(8, 6).save(path).unwrap();
    }

    fn reason(result: Result<Labelled, ExperimentError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn folders_are_classes() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["stroma/b.png", "stroma/a.png", "lymphocyte/c.png"] {
            picture(&folder.path().join(name));
        }
        fs::write(folder.path().join("stroma/notes.txt"), "").unwrap();
        fs::write(folder.path().join("readme.md"), "").unwrap();
        let found = read(folder.path(), &card("cells-vit")).unwrap();
        let items: Vec<_> = found.items.iter().map(|item| (item.truth.clone(), item.group)).collect();
        assert_eq!(items, [(Truth::Class(0), 0), (Truth::Class(2), 1), (Truth::Class(2), 2)]);
        assert!(found.items[1].image.ends_with("stroma/a.png") && !found.has_groups());
        assert_eq!(found.others, [folder.path().join("stroma/notes.txt")]);
        picture(&folder.path().join("d.png"));
        assert!(reason(read(folder.path(), &card("cells-vit"))).contains("d.png: lies in the folder of no class"));
        fs::remove_file(folder.path().join("d.png")).unwrap();
        assert!(reason(read(folder.path(), &card("cells-unet"))).contains("path,mask"));
        fs::create_dir(folder.path().join("blood")).unwrap();
        let said = reason(read(folder.path(), &card("cells-vit")));
        assert!(said.contains("\"blood\" is none of the model's classes: lymphocyte"), "{said}");
    }

    #[cfg(unix)]
    #[test]
    fn folders_that_are_links_are_classes_too() {
        let folder = tempfile::tempdir().unwrap();
        picture(&folder.path().join("elsewhere/deep/a.png"));
        fs::create_dir(folder.path().join("data")).unwrap();
        let link = folder.path().join("data/stroma");
        std::os::unix::fs::symlink(folder.path().join("elsewhere"), link).unwrap();
        let found = read(&folder.path().join("data"), &card("cells-vit")).unwrap();
        assert_eq!(found.items.iter().map(|item| item.truth.clone()).collect::<Vec<_>>(), [Truth::Class(2)]);
    }

    #[cfg(unix)]
    #[test]
    fn links_to_nothing_are_images_or_other_files_and_none_is_labelled_twice() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        picture(&at("stroma/a.png"));
        for name in ["stroma/b.png", "stroma/c.txt"] {
            std::os::unix::fs::symlink("none", at(name)).unwrap();
        }
        let found = read(folder.path(), &card("cells-vit")).unwrap();
        assert_eq!(
            (found.images(), found.others),
            (vec![at("stroma/a.png"), at("stroma/b.png")], vec![at("stroma/c.txt")])
        );
        fs::create_dir(at("glass")).unwrap();
        std::os::unix::fs::symlink(at("stroma/a.png"), at("glass/a.png")).unwrap();
        let said = reason(read(folder.path(), &card("cells-vit")));
        assert!(said.contains("stroma/a.png: is the same image as ") && said.ends_with("glass/a.png"), "{said}");
    }

    #[test]
    fn tables_name_images_classes_and_groups() {
        let folder = tempfile::tempdir().unwrap();
        ["a.png", "b.png", "c.png"].iter().for_each(|name| picture(&folder.path().join(name)));
        let write = |text: &str| {
            let path = folder.path().join("labels.csv");
            fs::write(&path, text).unwrap();
            path
        };
        let vit = card("cells-vit");
        let found =
            read(&write("image,label,group\na.png,glass,p2\nb.png, stroma,p1\nc.png,stroma,p2\n"), &vit).unwrap();
        assert_eq!(found.items.iter().map(|item| item.group).collect::<Vec<_>>(), [0, 1, 0]);
        assert_eq!(
            (found.groups, found.group_names.join(" "), found.items[1].truth.clone()),
            (2, "p2 p1".to_owned(), Truth::Class(2))
        );
        for (text, expected) in [
            ("image,class\na.png,glass\n", "needs the columns path and label, and has: image, class"),
            ("image,label\na.png,glass\nd.png,glass\n", "line 3: \"d.png\" is no file"),
            ("image,label\na.png,fat\n", "line 2: \"fat\" is none"),
            ("path,label\n", "holds no labelled image"),
            ("image,label,group\na.png,glass,1\n\nb.png,glass,\n", "line 4: has no group"),
            ("image,label\n\n\na.png\n", "line 4: has 1 columns, the first line 2"),
            ("path,Image,label\na.png,b.png,glass\n", "has 2 columns for the image: path, Image"),
            ("path,label,LABEL\na.png,glass,glass\n", "has 2 columns for the label: label, LABEL"),
            (
                "path,label\na.png,glass\nb.png,glass\n./a.png,glass\n",
                "line 4: \"./a.png\" is the image of line 2 again, with the same label",
            ),
            (
                "path,label\na.png,glass\na.png,stroma\n",
                "line 3: \"a.png\" is the image of line 2 again, with another label",
            ),
        ] {
            let said = reason(read(&write(text), &vit));
            assert!(said.contains(expected), "{said}");
        }
        let said = reason(read(&folder.path().join("a.png"), &vit));
        assert!(said.ends_with("a.png: is neither a folder nor a CSV in UTF-8"), "{said}");
        let masks = read(&write("image,mask\na.png,a.png\n"), &card("cells-unet")).unwrap();
        assert_eq!(masks.files(), ["a.png", "a.png", "labels.csv"].map(|name| folder.path().join(name)));
        assert!(matches!(&masks.items[0].truth, Truth::Mask(path) if path.ends_with("a.png")));
    }

    /// A card with one class, `tumour`.
    fn one(task: Task) -> ModelCard {
        let mut card = card(if task == Task::Segmentation { "cells-unet" } else { "cells-vit" });
        card.classes.truncate(1);
        card.classes[0].name = "tumour".to_owned();
        card
    }

    #[test]
    fn of_one_class_another_name_is_what_is_not_it() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["normal/a.png", "tumour/b.png"] {
            picture(&folder.path().join(name));
        }
        let model = one(Task::Classification);
        let classes = |found: &Labelled| found.items.iter().map(|item| item.truth.clone()).collect::<Vec<_>>();
        assert_eq!(classes(&read(folder.path(), &model).unwrap()), [Truth::Class(1), Truth::Class(0)]);
        fs::create_dir(folder.path().join("blood")).unwrap();
        let said = reason(read(folder.path(), &model));
        assert!(said.contains("\"normal\" and \"blood\" can't both be what is not \"tumour\""), "{said}");
        let write = |labels: &[&str]| {
            let path = folder.path().join("labels.csv");
            let rows: String =
                labels.iter().enumerate().map(|(index, label)| format!("more/{index}.png,{label}\n")).collect();
            fs::write(&path, format!("path,label\n{rows}")).unwrap();
            path
        };
        (0..4).for_each(|index| picture(&folder.path().join(format!("more/{index}.png"))));
        let found = read(&write(&["0", "1", "tumour", "0"]), &model).unwrap();
        assert_eq!((classes(&found), found.not.as_deref()), ([1, 0, 0, 1].map(Truth::Class).to_vec(), Some("0")));
        let zero = ModelCard { classes: vec![Class { name: "0".to_owned(), color: [0; 3] }], ..model.clone() };
        assert_eq!(classes(&read(&write(&["0", "1"]), &zero).unwrap()), [0, 1].map(Truth::Class));
        for (labels, expected) in [
            (&["tumour", "0", "negative"][..], "line 4: \"negative\" and \"0\" can't both be"),
            (&["tumour", "\"\""], "line 3: \"\" is none of the model's classes: tumour"),
            (&["normal", "normal"], "no image is labelled \"tumour\", the model's only class"),
            (
                &["tumour", "Tumour"],
                "line 3: \"Tumour\" differs from \"tumour\", the model's only class, by case alone",
            ),
        ] {
            let said = reason(read(&write(labels), &model));
            assert!(said.contains(expected), "{said}");
        }
    }

    #[test]
    fn a_mask_of_one_class_is_0_and_1_or_255() {
        let folder = tempfile::tempdir().unwrap();
        picture(&folder.path().join("a.png"));
        let mask = folder.path().join("m.png");
        let save = |values: [u8; 2]| {
            GrayImage::from_fn(8, 6, |x, _| Luma([values[usize::from(x > 0)]])).save(&mask).unwrap();
        };
        save([0, 1]);
        let table = folder.path().join("labels.csv");
        fs::write(&table, "path,mask\na.png,m.png\n").unwrap();
        let truth = read(&table, &one(Task::Segmentation)).unwrap().items[0].truth.clone();
        let pixels = || truth.pixels((8, 6), 2);
        // 0, which is first, is what is not the class.
        assert_eq!(pixels().unwrap()[..3], [1, 0, 0]);
        save([0, 255]);
        assert_eq!(pixels().unwrap()[..3], [1, 0, 0]);
        save([1, 255]);
        assert!(pixels().unwrap_err().to_string().contains("both 1 and 255"));
        save([0, 2]);
        assert!(pixels().unwrap_err().to_string().contains("holds the value 2, but of one class"));
        assert!(truth.pixels((8, 7), 2).unwrap_err().to_string().contains("8 × 6 px, but its image 8 × 7"));
    }

    #[test]
    fn masks_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.png");
        let save = |value: u8| GrayImage::from_pixel(8, 6, Luma([value])).save(&path).unwrap();
        save(255);
        assert_eq!(mask(&path, (8, 6), 3).unwrap(), [255; 48]);
        assert!(mask(&path, (8, 7), 3).unwrap_err().to_string().contains("8 × 6 px, but its image 8 × 7"));
        save(3);
        assert!(mask(&path, (8, 6), 3).unwrap_err().to_string().contains("the value 3"));
        picture(&path);
        assert!(mask(&path, (8, 6), 3).unwrap_err().to_string().contains("8-bit grey"));
    }
}
